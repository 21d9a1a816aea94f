"""Data: every source, the axis conventions, batching, trimming, splits, and each kind of bad input as one line."""

from __future__ import annotations

import re
import string
import zipfile
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from intaglio.passes.data import Dataset, Feed, InputSpec, input_specs, open_dataset, split
from intaglio.passes.errors import InputError

FLOAT32, INT64 = np.dtype(np.float32), np.dtype(np.int64)
IMAGES = (InputSpec("x", FLOAT32, ("batch", 3)),)
TOKENS = tuple(InputSpec(name, INT64, ("batch", "seq")) for name in ("input_ids", "attention_mask", "token_type_ids"))


def numbered(*shape: int) -> np.ndarray:
    """Float32 values that are all different, so that a misplaced sample shows."""
    return np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)


def collect(dataset: Dataset, batch: int = 32) -> list[tuple[Feed, list[int]]]:
    return [(feed, indices.tolist()) for feed, indices in dataset.feeds(np.arange(len(dataset)), batch)]


def tokens(lengths: list[int], width: int) -> dict[str, np.ndarray]:
    """Right-padded token arrays whose ids say which sample and position they are; padding is -1."""
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    ids = np.where(mask == 1, 100 * np.arange(len(lengths))[:, None] + np.arange(width), -1)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(mask)}


def write_sets(folder: Path, sets: list[list[TensorProto]]) -> Path:
    for number, tensors in enumerate(sets):
        target = folder / f"test_data_set_{number}"
        target.mkdir(parents=True)
        for position, tensor in enumerate(tensors):
            (target / f"input_{position}.pb").write_bytes(tensor.SerializeToString())
    return folder


class TestInputSpecs:
    def test_declared_inputs(self) -> None:
        model = onnx.parser.parse_model(
            """<ir_version: 8, opset_import: ["" : 17]>
            f (float[batch, 3, 8] x, int64[?, seq] ids, bfloat16 scale) => (float[batch, 3, 8] y) { y = Identity(x) }"""
        )
        assert input_specs(model) == (
            InputSpec("x", FLOAT32, ("batch", 3, 8)),
            InputSpec("ids", INT64, (None, "seq")),
            InputSpec("scale", np.dtype(ml_dtypes.bfloat16), ()),
        )

    def test_initializers_are_no_inputs(self) -> None:
        inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in ("x", "w")]
        weight = numpy_helper.from_array(np.ones((1, 2), np.float32), "w")
        graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", inputs, inputs[:1], [weight])
        assert [spec.name for spec in input_specs(helper.make_model(graph, ir_version=3))] == ["x"]

    def test_a_negative_size_is_dynamic(self) -> None:
        value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [-1, 3])
        assert input_specs(helper.make_model(helper.make_graph([], "g", [value], [])))[0].shape == (None, 3)

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            (helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, [1]), "'s' has type sequence"),
            (helper.make_value_info("o", helper.make_optional_type_proto(onnx.TypeProto())), "'o' has type optional"),
            (helper.make_tensor_value_info("x", TensorProto.FLOAT, None), "'x' declares no rank"),
            (helper.make_tensor_value_info("x", 99, [1]), "element type 99"),
        ],
    )
    def test_refusals(self, value: onnx.ValueInfoProto, reason: str) -> None:
        with pytest.raises(InputError, match=reason):
            input_specs(helper.make_model(helper.make_graph([], "g", [value], [])))


class TestAxisConventions:
    @given(
        lead=st.sampled_from([None, "batch", 1, 2, 3]),
        tail=st.lists(st.integers(1, 3), max_size=3),
        count=st.integers(3, 9),
        batch=st.integers(1, 5),
    )
    def test_own_rank_holds_samples_along_axis_0(self, lead: int | str | None, tail: list[int], count: int, batch: int) -> None:
        array = numbered(count, *tail)
        dataset = open_dataset({"x": array}, [InputSpec("x", FLOAT32, (lead, *tail))])
        feeds = collect(dataset, batch)
        step = lead if isinstance(lead, int) else batch
        whole = count // step * step if isinstance(lead, int) else count
        assert len(dataset) == count
        assert [index for _, indices in feeds for index in indices] == list(range(whole))
        assert {len(indices) for _, indices in feeds[:-1]} <= {step}
        for feed, indices in feeds:
            np.testing.assert_array_equal(feed["x"], array[indices], strict=True)

    @given(shape=st.lists(st.tuples(st.integers(1, 3), st.booleans()), max_size=3), count=st.integers(1, 6))
    def test_one_axis_more_holds_one_whole_feed_per_row(self, shape: list[tuple[int, bool]], count: int) -> None:
        array = numbered(count, *(size for size, _ in shape))
        spec = InputSpec("h", FLOAT32, tuple(None if dynamic else size for size, dynamic in shape))
        feeds = collect(open_dataset({"h": array}, [spec]))
        assert [indices for _, indices in feeds] == [[index] for index in range(count)]
        for feed, (index,) in feeds:
            assert isinstance(feed["h"], np.ndarray)
            np.testing.assert_array_equal(feed["h"], array[index, ...], strict=True)

    @given(lead=st.sampled_from(["batch", 1, 2, 4]), count=st.integers(1, 5))
    def test_whole_feeds_of_one_input_cut_the_others(self, lead: int | str, count: int) -> None:
        size = lead if isinstance(lead, int) else 1
        x, state = numbered(count * size, 3), numbered(count, 2, size, 5)
        inputs = [InputSpec("x", FLOAT32, (lead, 3)), InputSpec("state", FLOAT32, (2, lead, 5))]
        for feed, (index,) in collect(open_dataset({"x": x, "state": state}, inputs)):
            np.testing.assert_array_equal(feed["x"], x[index * size : (index + 1) * size], strict=True)
            np.testing.assert_array_equal(feed["state"], state[index], strict=True)

    def test_whole_feeds_leave_out_the_remainder(self) -> None:
        inputs = [InputSpec("x", FLOAT32, (2, 3)), InputSpec("state", FLOAT32, (1, 2))]
        feeds = collect(open_dataset({"x": numbered(5, 3), "state": numbered(2, 1, 2)}, inputs))
        assert [feed["x"][:, 0].tolist() for feed, _ in feeds] == [[0, 3], [6, 9]]

    def test_an_empty_leading_axis_is_no_batch(self) -> None:
        inputs = [InputSpec("past", FLOAT32, (0, 3)), InputSpec("x", FLOAT32, (2, 3))]
        assert len(open_dataset({"past": numbered(5, 0, 3), "x": numbered(5, 2, 3)}, inputs)) == 5
        with pytest.raises(InputError, match=r"'past' has shape \[5, 3\]"):
            open_dataset({"past": numbered(5, 3), "x": numbered(5, 2, 3)}, inputs)

    def test_inputs_of_different_fixed_batch(self) -> None:
        inputs = [InputSpec("image", FLOAT32, (1, 3)), InputSpec("boxes", FLOAT32, (4, 2))]
        feeds = collect(open_dataset({"image": numbered(5, 3), "boxes": numbered(20, 2)}, inputs))
        assert [(feed["image"][0, 0], feed["boxes"][0, 0]) for feed, _ in feeds] == [(3 * i, 8 * i) for i in range(5)]

    def test_a_scalar_is_given_to_every_feed(self) -> None:
        inputs = [*IMAGES, InputSpec("scale", FLOAT32, ())]
        feeds = collect(open_dataset({"x": numbered(5, 3), "scale": np.array(2.0)}, inputs), batch=3)
        assert [indices for _, indices in feeds] == [[0, 1, 2], [3, 4]]
        assert all(feed["scale"].shape == () and feed["scale"] == 2 for feed, _ in feeds)

    def test_only_scalars_make_one_sample(self) -> None:
        ((feed, indices),) = collect(open_dataset({"scale": 2.0}, [InputSpec("scale", FLOAT32, ())]))
        assert feed["scale"] == 2
        assert indices == [0]

    def test_feeds_follow_the_indices_asked_for(self) -> None:
        dataset = open_dataset({"x": numbered(9, 3)}, IMAGES)
        ((feed, indices),) = dataset.feeds(np.array([7, 2, 4]))
        assert indices.tolist() == [7, 2, 4]
        assert indices.dtype == np.int64
        assert feed["x"][:, 0].tolist() == [21, 6, 12]
        assert list(dataset.feeds(np.array([], dtype=int))) == []

    def test_too_few_indices_for_a_fixed_batch(self) -> None:
        dataset = open_dataset({"x": numbered(9, 3)}, [InputSpec("x", FLOAT32, (4, 3))])
        with pytest.raises(InputError, match="3 samples cannot fill the model's fixed batch of 4"):
            next(dataset.feeds(np.arange(3)))


class TestTypes:
    @pytest.mark.parametrize(
        ("given_type", "declared"),
        [
            (np.float64, np.float32),
            (np.float16, np.float32),
            (np.float32, np.float16),
            (np.float32, ml_dtypes.bfloat16),
            (ml_dtypes.bfloat16, np.float32),
            (np.int32, np.int64),
            (np.int64, np.int32),
            (np.uint8, np.int64),
            (np.int64, ml_dtypes.int4),
            (np.bool_, np.bool_),
        ],
    )
    def test_casts_within_a_kind(self, given_type: type, declared: type) -> None:
        values: np.ndarray = np.array([[0, 1, 1]] * 2).astype(given_type)
        cast = open_dataset({"x": values}, [InputSpec("x", np.dtype(declared), ("n", 3))]).first(2)["x"]
        assert cast.dtype == declared
        assert cast.astype(np.float64).tolist() == [[0, 1, 1]] * 2

    @pytest.mark.parametrize(
        ("given_type", "declared"),
        [
            (np.uint8, np.float32),
            (np.float32, np.int64),
            (np.bool_, np.int64),
            (np.int64, np.bool_),
            (np.complex64, np.float32),
            (np.str_, np.float32),
            (np.float32, np.object_),
            (np.int64, ml_dtypes.bfloat16),
        ],
    )
    def test_refuses_another_kind(self, given_type: type, declared: type) -> None:
        with pytest.raises(InputError, match=r"'x' holds .*, the model takes .*; convert it"):
            open_dataset({"x": np.ones((2, 3)).astype(given_type)}, [InputSpec("x", np.dtype(declared), ("n", 3))])

    def test_refuses_values_that_do_not_fit(self) -> None:
        with pytest.raises(InputError, match="int64 values that do not fit the model's int32"):
            open_dataset({"x": np.array([[2**31]])}, [InputSpec("x", np.dtype(np.int32), ("n", 1))])

    @pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
    def test_refuses_what_is_not_finite(self, value: float) -> None:
        with pytest.raises(InputError, match="'x' has NaN, infinity or values too large for float32"):
            open_dataset({"x": np.array([[0, 0, value]])}, IMAGES)

    def test_bfloat16_survives_an_npz(self, tmp_path: Path) -> None:
        values: np.ndarray = np.array([[1.5, -2.0, 3.0]], dtype=ml_dtypes.bfloat16)
        np.savez(tmp_path / "d.npz", x=values)
        read = open_dataset(tmp_path / "d.npz", [InputSpec("x", values.dtype, ("n", 3))]).first()["x"]
        np.testing.assert_array_equal(read, values, strict=True)

    def test_strings_pass_as_objects(self, tmp_path: Path) -> None:
        inputs = [InputSpec("text", np.dtype(object), ("n",))]
        np.savez(tmp_path / "d.npz", text=np.array(["ab", "c"]))
        read = open_dataset(tmp_path / "d.npz", inputs)
        assert read.first(2)["text"].tolist() == ["ab", "c"]
        assert read.first(2)["text"].dtype == object
        assert read.digest != open_dataset({"text": np.array(["ab", "d"])}, inputs).digest
        with pytest.raises(InputError, match="objects other than strings"):
            open_dataset({"text": np.array(["ab", None], dtype=object)}, inputs)


class TestNpz:
    def test_reads_inputs_and_labels_only(self, tmp_path: Path) -> None:
        path = tmp_path / "d.npz"
        np.savez(path, x=numbered(4, 3), y=np.array([5, 6, 7, 8]), extra=np.array([object()]))  # reading `extra` would fail
        dataset = open_dataset(str(path), IMAGES, labels="y")
        labels = dataset.labels(np.array([3, 1]))
        assert labels is not None
        assert labels.tolist() == [8, 6]
        np.testing.assert_array_equal(dataset.first(4)["x"], numbered(4, 3), strict=True)
        assert open_dataset(path, IMAGES).labels(np.array([0])) is None

    @pytest.mark.parametrize(
        ("arrays", "labels", "reason"),
        [
            ({"image": numbered(4, 3)}, None, "no array 'x', it holds 'image'"),
            ({}, None, "no array 'x', it holds nothing"),
            ({"x": numbered(4, 3)}, "y", "no array 'y', it holds 'x'"),
            ({"x": numbered(4, 3), "y": np.zeros(3)}, "y", r"labels 'y' have shape \[3\], expected one for each of 4 samples"),
            ({"x": numbered(4, 3), "y": np.array(1)}, "y", r"labels 'y' have shape \[\]"),
            ({"x": numbered(4, 5)}, None, r"shape \[4, 5\], expected .* \[samples, 3\] or .* \[feeds, batch, 3\]"),
            ({"x": numbered(4)}, None, r"shape \[4\], expected"),
            ({"x": np.array(1.0)}, None, r"shape \[\], expected"),
            ({"x": numbered(2, 2, 2, 3)}, None, r"shape \[2, 2, 2, 3\], expected"),
            ({"x": numbered(0, 3)}, None, "0 samples, but one feed of the model holds 1"),
            ({"x": np.array([object()])}, None, "not a readable .npz file of plain arrays .ValueError: Object arrays"),
            ({"x": numbered(4, 3), "y": np.array([object()] * 4)}, "y", "not a readable .npz file"),
        ],
    )
    def test_bad_content(self, tmp_path: Path, arrays: dict[str, np.ndarray], labels: str | None, reason: str) -> None:
        np.savez(tmp_path / "d.npz", **arrays)
        with pytest.raises(InputError, match=reason) as caught:
            open_dataset(tmp_path / "d.npz", IMAGES, labels=labels)
        assert str(tmp_path / "d.npz") in str(caught.value)
        assert "\n" not in str(caught.value)

    @given(cut=st.floats(0, 0.99))
    def test_truncated(self, tmp_path_factory: pytest.TempPathFactory, cut: float) -> None:
        path = tmp_path_factory.mktemp("npz") / "d.npz"
        np.savez(path, x=numbered(4, 3))
        path.write_bytes(path.read_bytes()[: int(cut * path.stat().st_size)])
        with pytest.raises(InputError, match=r"not a readable .npz file"):
            open_dataset(path, IMAGES)

    def test_a_header_that_lies_about_its_size(self, tmp_path: Path) -> None:
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999999, 3), }".ljust(117) + b"\n"
        with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
            archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
        with pytest.raises(InputError, match=r"not a readable .npz file"):
            open_dataset(tmp_path / "d.npz", IMAGES)

    def test_other_files_under_that_name(self, tmp_path: Path) -> None:
        path = tmp_path / "d.npz"
        with pytest.raises(InputError, match="no such file"):
            open_dataset(path, IMAGES)
        np.save(tmp_path / "d.npy", numbered(4, 3))
        (tmp_path / "d.npy").rename(path)
        with pytest.raises(InputError, match=r"a single array, not an .npz file"):
            open_dataset(path, IMAGES)

    def test_different_numbers_of_samples(self) -> None:
        inputs = [InputSpec(name, FLOAT32, ("n", 3)) for name in "ab"]
        with pytest.raises(InputError, match=r"differ in their number of samples \('a' 4, 'b' 5\)"):
            open_dataset({"a": numbered(4, 3), "b": numbered(5, 3)}, inputs)

    def test_fewer_samples_than_a_fixed_batch(self) -> None:
        with pytest.raises(InputError, match="4 samples, but one feed of the model holds 8"):
            open_dataset({"x": numbered(4, 3)}, [InputSpec("x", FLOAT32, (8, 3))])


class TestWholeFeeds:
    def test_joined_while_shapes_agree(self) -> None:
        feeds = [{"x": numbered(1, size)} for size in (2, 2, 3, 3, 3, 2)]
        dataset = open_dataset(iter(feeds), [InputSpec("x", FLOAT32, ("batch", "time"))])
        assert [indices for _, indices in collect(dataset, batch=2)] == [[0, 1], [2, 3], [4], [5]]
        assert dataset.first(4)["x"].shape == (2, 2)

    @pytest.mark.parametrize(
        "inputs",
        [
            [InputSpec("x", FLOAT32, (1, "time"))],
            [InputSpec("x", FLOAT32, ("time", 2)), InputSpec("mask", FLOAT32, ("batch", "time"))],
            [InputSpec("x", FLOAT32, ("batch", 2)), InputSpec("scale", FLOAT32, ())],
        ],
    )
    def test_not_joined_where_axis_0_may_not_be_the_batch(self, inputs: list[InputSpec]) -> None:
        sample = {"x": numbered(1, 2), "mask": numbered(1, 1), "scale": np.array(3.0)}
        assert [indices for _, indices in collect(open_dataset([sample, sample], inputs))] == [[0], [1]]

    def test_not_cut_or_joined_when_they_hold_several_samples(self) -> None:
        feeds = collect(open_dataset([{"x": numbered(5, 3)}, {"x": numbered(5, 3)}], IMAGES), batch=2)
        assert [feed["x"].shape for feed, _ in feeds] == [(5, 3), (5, 3)]

    @pytest.mark.parametrize(
        ("feeds", "reason"),
        [
            ([], "data: it holds no feeds"),
            ([{"x": numbered(1, 3)}, {"y": numbered(1, 3)}], "data: feed 1: no array 'x', it holds 'y'"),
            ([{"x": numbered(1, 4)}], r"data: feed 0: array 'x' has shape \[1, 4\], expected \[batch, 3\]"),
            ([{"x": numbered(3)}], r"data: feed 0: array 'x' has shape \[3\], expected \[batch, 3\]"),
            ([{"x": [[1.0, 2.0], [3.0]]}], "data: feed 0: array 'x' is ragged"),
            (numbered(4, 3), "data: feed 0 is a ndarray, expected a mapping"),
        ],
    )
    def test_bad_feeds(self, feeds: list[Mapping[str, np.ndarray]], reason: str) -> None:
        with pytest.raises(InputError, match=reason):
            open_dataset(feeds, IMAGES)

    def test_labels_need_columns(self) -> None:
        with pytest.raises(InputError, match=r"labels 'y' need an .npz file or a mapping"):
            open_dataset([{"x": numbered(1, 3)}], IMAGES, labels="y")


class TestFolder:
    def test_sets_in_numeric_order(self, tmp_path: Path) -> None:
        arrays = [np.full((2, 3), number, np.float32) for number in range(11)]
        second = numpy_helper.from_array(np.array([b"t"], dtype=object))
        write_sets(tmp_path, [[numpy_helper.from_array(array), second] for array in arrays])
        feeds = collect(open_dataset(tmp_path, [*IMAGES, InputSpec("t", np.dtype(object), (1,))]))
        assert [feed["x"][0, 0] for feed, _ in feeds] == list(range(11))
        assert feeds[0][0]["t"].tolist() == ["t"]

    def test_bad_folders(self, tmp_path: Path) -> None:
        tensor = numpy_helper.from_array(numbered(1, 3))
        outside = TensorProto(name="x", dims=[1], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
        outside.external_data.add(key="location", value="weights.bin")
        garbled = TensorProto(data_type=TensorProto.FLOAT, dims=[7], raw_data=b"abc")
        cases: list[tuple[list[list[TensorProto]], str]] = [
            ([], "no test_data_set_"),
            ([[]], "input_0.pb: no such file, expected the tensor for input 'x'"),
            ([[tensor, tensor]], "input_1.pb is one too many, the model has 1 inputs"),
            ([[outside]], "input_0.pb: the tensor's data lies in another file"),
            ([[garbled]], "input_0.pb: no tensor for input 'x'"),
            ([[tensor], [numpy_helper.from_array(numbered(1, 4))]], r"feed 1: array 'x' has shape \[1, 4\]"),
        ]
        for number, (sets, reason) in enumerate(cases):
            folder = tmp_path / str(number)
            folder.mkdir()
            with pytest.raises(InputError, match=reason):
                open_dataset(write_sets(folder, sets), IMAGES)

    def test_not_a_protobuf(self, tmp_path: Path) -> None:
        (tmp_path / "test_data_set_0").mkdir()
        (tmp_path / "test_data_set_0" / "input_0.pb").write_text("not a tensor")
        with pytest.raises(InputError, match="no tensor for input 'x'"):
            open_dataset(tmp_path, IMAGES)


class TestPythonFile:
    def test_samples(self, tmp_path: Path) -> None:
        path = tmp_path / "d.py"
        path.write_text(
            "import numpy as np\nCOUNT = 3\n"
            "def samples():\n    for i in range(COUNT):\n        yield {'x': np.full((1, 3), i, np.float32), 'note': i}\n"
            "if __name__ == '__main__':\n    raise SystemExit\n"
        )
        ((feed, indices),) = collect(open_dataset(path, IMAGES))
        assert feed["x"][:, 0].tolist() == indices == [0, 1, 2]
        assert [entry.name for entry in tmp_path.iterdir()] == ["d.py"]  # no bytecode beside the user's file

    @pytest.mark.parametrize(
        ("code", "reason"),
        [
            ("def samples(:", "running it failed .SyntaxError"),
            ("raise ValueError('first\\nsecond')", r"running it failed \(ValueError: first\); mend the file$"),
            ("import sys; sys.exit(3)", "running it failed .SystemExit: 3"),
            ("x = 1", r"defines no samples\(\)"),
            ("def samples(): return 3", "running it failed .TypeError"),
            ("def samples():\n    yield {}\n", "feed 0: no array 'x', it holds nothing"),
            ("def samples():\n    yield from ()\n", "holds no feeds"),
        ],
    )
    def test_failures_are_one_line(self, tmp_path: Path, code: str, reason: str) -> None:
        path = tmp_path / "d.py"
        path.write_text(code)
        with pytest.raises(InputError, match=reason) as caught:
            open_dataset(path, IMAGES)
        assert re.fullmatch(rf"{re.escape(str(path))}: .*", str(caught.value))

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no such file; give a Python file"):
            open_dataset(tmp_path / "d.py", IMAGES)


class TestRandom:
    INPUTS = (
        InputSpec("x", FLOAT32, ("batch", 3, "height", None)),
        InputSpec("ids", INT64, ("batch", "height")),
        InputSpec("my_attention_mask", INT64, ("batch", "height")),
        InputSpec("flag", np.dtype(bool), ("batch", 1)),
        InputSpec("half", np.dtype(ml_dtypes.bfloat16), ("batch", 2)),
    )

    def test_shapes_types_and_ranges(self) -> None:
        dataset = open_dataset("random", self.INPUTS)
        assert dataset.synthetic
        feed = next(dataset.feeds(np.arange(len(dataset)), 64))[0]
        assert [array.shape[0] for array in feed.values()] == [len(dataset)] * 5
        assert [array.dtype for array in feed.values()] == [spec.dtype for spec in self.INPUTS]
        assert feed["x"].shape[2] == feed["ids"].shape[1]
        assert abs(feed["x"].mean()) < 0.01  # 6 standard errors of about 200,000 draws
        assert abs(feed["x"].std() - 1) < 0.01
        assert set(np.unique(feed["ids"])) == {0, 1}
        assert feed["my_attention_mask"].all()

    def test_seeded(self) -> None:
        digests = [open_dataset("random", self.INPUTS, seed=seed).digest for seed in (0, 0, 1)]
        assert digests[0] == digests[1] != digests[2]

    def test_fixed_shapes_and_a_sequence_axis_in_front(self) -> None:
        inputs = [InputSpec("x", FLOAT32, ("time", 4)), InputSpec("mask", FLOAT32, (2, "time"))]
        feeds = collect(open_dataset("random", inputs))
        assert {(feed["x"].shape, feed["mask"].shape) for feed, _ in feeds} == {((1, 4), (2, 1))}

    @pytest.mark.parametrize(
        ("spec", "reason"),
        [
            (InputSpec("t", np.dtype(object), (1,)), "random values of type object for input 't' cannot be made"),
            (InputSpec("x", FLOAT32, (1, 10**9)), "one random sample would take 8000000000 bytes"),
        ],
    )
    def test_refusals(self, spec: InputSpec, reason: str) -> None:
        with pytest.raises(InputError, match=reason):
            open_dataset("random", [spec])


class TestOtherSources:
    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("d.npy", "a .npy file does not name its input"),
            ("d.csv", "not a known kind of data; expected an .npz or .py file"),
            ("absent", "no such file or folder; expected an .npz"),
        ],
    )
    def test_unknown(self, tmp_path: Path, name: str, reason: str) -> None:
        if name != "absent":
            (tmp_path / name).touch()
        with pytest.raises(InputError, match=reason):
            open_dataset(tmp_path / name, IMAGES)

    def test_a_model_without_inputs(self) -> None:
        with pytest.raises(InputError, match="it has no inputs"):
            open_dataset("random", [])


class TestTrim:
    @given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=12), batch=st.integers(1, 4))
    def test_feeds_hold_equal_lengths_and_no_padding(self, lengths: list[int], batch: int) -> None:
        arrays = tokens(lengths, 6)
        feeds = collect(open_dataset(arrays, TOKENS), batch)
        assert sorted(index for _, indices in feeds for index in indices) == list(range(len(lengths)))
        widths = [feed["input_ids"].shape[1] for feed, _ in feeds]
        assert widths == sorted(widths)
        for feed, indices in feeds:
            (length,) = {lengths[index] for index in indices}
            for name, array in feed.items():
                np.testing.assert_array_equal(array, arrays[name][indices, :length], strict=True)

    def test_off(self) -> None:
        arrays = tokens([2, 5], 6)
        ((feed, _),) = collect(open_dataset(arrays, TOKENS, trim=False))
        np.testing.assert_array_equal(feed["input_ids"], arrays["input_ids"])
        assert open_dataset(arrays, TOKENS, trim=False).digest != open_dataset(arrays, TOKENS).digest

    def test_first_is_untrimmed_unless_asked(self) -> None:
        dataset = open_dataset(tokens([2, 5, 6], 6), TOKENS)
        assert dataset.first()["input_ids"].shape == (1, 6)
        assert dataset.first(trimmed=True)["input_ids"].shape == (1, 2)
        assert dataset.first(2, trimmed=True)["input_ids"].shape == (2, 5)

    def test_left_padding_and_inner_zeros_stay(self) -> None:
        arrays = tokens([6, 6, 6], 6)
        arrays["attention_mask"] = np.array([[0, 0, 1, 1, 1, 1], [1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
        widths = {indices[0]: feed["input_ids"].shape[1] for feed, indices in collect(open_dataset(arrays, TOKENS), 1)}
        assert widths == {0: 6, 1: 3, 2: 1}

    def test_axes_that_share_the_name_are_cut_and_others_are_not(self) -> None:
        inputs = [
            *TOKENS[:2],
            InputSpec("bias", FLOAT32, ("batch", 1, "seq", "seq")),
            InputSpec("decoder_ids", INT64, ("batch", "target")),
            InputSpec("unnamed", INT64, ("batch", None)),
            InputSpec("image", FLOAT32, ("batch", 6)),
            InputSpec("wider", INT64, ("batch", None)),
        ]
        arrays = tokens([2], 6) | {"bias": numbered(1, 1, 6, 6), "image": numbered(1, 6)}
        arrays |= {"decoder_ids": np.ones((1, 6), int), "unnamed": np.ones((1, 6), int), "wider": np.ones((1, 7), int)}
        feed = open_dataset(arrays, inputs).first(trimmed=True)
        assert [feed[spec.name].shape for spec in inputs] == [(1, 2), (1, 2), (1, 1, 2, 2), (1, 6), (1, 2), (1, 6), (1, 7)]
        np.testing.assert_array_equal(feed["bias"], arrays["bias"][:, :, :2, :2])

    def test_every_mask_of_an_axis_counts(self) -> None:
        arrays = tokens([4], 6) | {"global_attention_mask": np.array([[1, 0, 0, 0, 0, 0]])}
        inputs = [*TOKENS, InputSpec("global_attention_mask", INT64, ("batch", "seq"))]
        assert open_dataset(arrays, inputs).first(trimmed=True)["input_ids"].shape == (1, 4)

    def test_masks_of_different_width_on_unnamed_axes(self) -> None:
        arrays = tokens([2], 6) | {"decoder_attention_mask": np.array([[1, 0, 0]])}
        names = ("input_ids", "attention_mask", "decoder_attention_mask")
        feed = open_dataset(arrays, [InputSpec(name, INT64, ("batch", None)) for name in names]).first(trimmed=True)
        assert [feed[name].shape for name in names] == [(1, 6), (1, 6), (1, 3)]

    def test_encoder_and_decoder_have_their_own_lengths(self) -> None:
        encoder, decoder = tokens([2, 4, 2], 6), tokens([5, 1, 5], 6)
        arrays = encoder | {f"decoder_{name}": array for name, array in decoder.items()}
        inputs = [*TOKENS[:2], *(InputSpec(f"decoder_{spec.name}", INT64, ("batch", "target")) for spec in TOKENS[:2])]
        feeds = collect(open_dataset(arrays, inputs))
        shapes = [(feed["input_ids"].shape, feed["decoder_input_ids"].shape, indices) for feed, indices in feeds]
        assert shapes == [((2, 2), (2, 5), [0, 2]), ((1, 4), (1, 1), [1])]

    @pytest.mark.parametrize(
        "inputs",
        [
            [InputSpec("input_ids", INT64, ("batch", 6)), InputSpec("attention_mask", INT64, ("batch", 6))],
            [InputSpec("input_ids", INT64, ("batch", "a")), InputSpec("attention_mask", INT64, ("batch", "b"))],
            [InputSpec("input_ids", INT64, (2, "seq")), InputSpec("attention_mask", INT64, (2, "seq"))],
            [*TOKENS[:2], InputSpec("token_type_ids", INT64, ("seq", 6))],
        ],
    )
    def test_must_not_fire(self, inputs: list[InputSpec]) -> None:
        ((feed, _),) = collect(open_dataset(tokens([2, 3], 6), inputs))
        assert feed["input_ids"].shape == feed["attention_mask"].shape == (2, 6)

    def test_a_float_mask_is_not_a_token_mask(self) -> None:
        arrays = {"attention_mask": np.zeros((1, 6), np.float32), "input_ids": np.ones((1, 6), int)}
        inputs = [InputSpec("attention_mask", FLOAT32, ("batch", "seq")), TOKENS[0]]
        assert open_dataset(arrays, inputs).first(trimmed=True)["input_ids"].shape == (1, 6)


class TestDigest:
    def test_depends_on_content_alone(self, tmp_path: Path) -> None:
        np.savez_compressed(tmp_path / "d.npz", x=numbered(4, 3).astype(np.float64), y=np.arange(4))
        same = [
            open_dataset(tmp_path / "d.npz", IMAGES, labels="y"),
            open_dataset({"x": numbered(4, 3)}, IMAGES),
            open_dataset([{"x": row[None]} for row in numbered(4, 3)], IMAGES),
        ]
        assert len({dataset.digest for dataset in same}) == 1
        changed = numbered(4, 3)
        changed[3, 2] += 1
        assert open_dataset({"x": changed}, IMAGES).digest != same[0].digest


class TestSplit:
    @given(count=st.integers(3, 500), seed=st.integers(0, 2**32), samples=st.none() | st.integers(3, 600))
    def test_disjoint_sorted_and_of_the_right_sizes(self, count: int, seed: int, samples: int | None) -> None:
        splits = split(count, seed=seed, samples=samples)
        parts = [splits.fit, splits.choose, splits.verify]
        total = min(count, samples or count)
        assert len(set(np.concatenate(parts).tolist())) == total
        assert [len(part) for part in parts[1:]] == [max(1, total // 4)] * 2
        assert len(splits.fit) == total - 2 * max(1, total // 4)
        assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() and 0 <= part[0] <= part[-1] < count for part in parts)

    def test_seeded(self) -> None:
        first, again, other = (split(100, seed=seed) for seed in (0, 0, 1))
        assert first.fit.tolist() == again.fit.tolist() != other.fit.tolist()

    @pytest.mark.parametrize(("count", "samples"), [(0, None), (2, None), (100, 2), (100, 0)])
    def test_too_few(self, count: int, samples: int | None) -> None:
        with pytest.raises(InputError, match="none can be held out"):
            split(count, seed=0, samples=samples)


def test_first_takes_a_fixed_batch() -> None:
    dataset = open_dataset({"x": numbered(9, 3)}, [InputSpec("x", FLOAT32, (4, 3))])
    assert dataset.first()["x"].shape == (4, 3)
    assert open_dataset({"x": numbered(2, 3)}, IMAGES).first(8)["x"].shape == (2, 3)


@given(names=st.lists(st.text(string.printable, min_size=1, max_size=8), min_size=1, max_size=4, unique=True))
def test_any_input_name(names: list[str]) -> None:
    inputs = [InputSpec(name, FLOAT32, ("batch", 3)) for name in names]
    ((feed, _),) = collect(open_dataset({name: numbered(2, 3) for name in reversed(names)}, inputs))
    assert list(feed) == names
    with pytest.raises(InputError, match=r"\A[^\n]*\Z"):
        open_dataset({name: numbered(2, 4) for name in names}, inputs)
