"""Train the network of the demo and write it as `digits.onnx`.

Run it with the extra `train` installed: `python examples/digits/train.py`. It takes about a minute on a CPU. The
graph is built by hand from the trained weights rather than by an exporter, so the committed file has readable names and
does not depend on an exporter's version. BatchNormalization stays a node of its own, as many exported models have it.

The network, for an input `image` of shape (batch, 1, 8, 8) in 0..1:

    conv1 1→32, conv2 32→64, conv3 64→64, max pool, conv4 64→128, conv5 128→128, max pool, flatten, fc1 512→256, fc2 256→10

Every convolution is 3 x 3 with padding 1 and is followed by BatchNormalization and Relu; fc1 is followed by Relu. The
output `logits` has shape (batch, 10). Only the train part of the data is used; the test part is scored once, at the end.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from data import CLASSES, IMAGE_SHAPE, Part, load_parts
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession
from torch import nn
from torch.nn import functional

OUTPUT = Path(__file__).with_name("digits.onnx")
OPSET = 17
IR_VERSION = 8

CHANNELS = (1, 32, 64, 64, 128, 128)
POOL_AFTER = (3, 5)
FLAT = 128 * 2 * 2
HIDDEN = 256

SEED = 0
EPOCHS = 60
BATCH = 64
PEAK_LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-2
LABEL_SMOOTHING = 0.05
NOISE = 0.05
REQUIRED_ACCURACY = 0.98


class Network(nn.Module):
    """The trainable network; its attribute names become the names in the ONNX file."""

    def __init__(self) -> None:
        super().__init__()
        for index in range(1, len(CHANNELS)):
            self.add_module(f"conv{index}", nn.Conv2d(CHANNELS[index - 1], CHANNELS[index], 3, padding=1, bias=False))
            self.add_module(f"bn{index}", nn.BatchNorm2d(CHANNELS[index]))
        self.fc1 = nn.Linear(FLAT, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, CLASSES)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = image
        for index in range(1, len(CHANNELS)):
            x = functional.relu(self.get_submodule(f"bn{index}")(self.get_submodule(f"conv{index}")(x)))
            if index in POOL_AFTER:
                x = functional.max_pool2d(x, 2)
        x = functional.dropout(x.flatten(1), 0.3, self.training)
        return self.fc2(functional.dropout(functional.relu(self.fc1(x)), 0.3, self.training))


def augment(image: torch.Tensor) -> torch.Tensor:
    """Each image moved by at most one pixel per axis, with a little noise; same shape as `image`."""
    height, width = IMAGE_SHAPE[1:]
    padded = functional.pad(image, (1, 1, 1, 1))
    shifts = torch.randint(0, 3, (len(image), 2)).tolist()
    moved = torch.stack([one[:, y : y + height, x : x + width] for one, (y, x) in zip(padded, shifts, strict=True)])
    return (moved + NOISE * torch.randn_like(moved)).clamp(0, 1)


def train(part: Part) -> Network:
    """A network trained on `part`, in evaluation mode."""
    torch.manual_seed(SEED)
    network = Network()
    image, label = torch.from_numpy(part.image), torch.from_numpy(part.label)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * -(-len(label) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=steps)
    for epoch in range(EPOCHS):
        total = 0.0
        for chosen in torch.randperm(len(label)).split(BATCH):
            loss = functional.cross_entropy(network(augment(image[chosen])), label[chosen], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
        print(f"epoch {epoch + 1:2d}/{EPOCHS}  loss {total / len(label):.4f}", flush=True)
    return network.eval()


def to_onnx(network: Network) -> onnx.ModelProto:
    """The trained network as an ONNX model with a dynamic batch axis."""
    state = {name: value.numpy() for name, value in network.state_dict().items()}
    nodes, initializers = [], []

    def add(op_type: str, name: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op_type, inputs, [output], name=name, **attributes))
        return output

    def weights(*names: str) -> list[str]:
        initializers.extend(numpy_helper.from_array(state[name], name) for name in names)
        return list(names)

    x = "image"
    for index in range(1, len(CHANNELS)):
        conv, norm, relu, pool = f"conv{index}", f"bn{index}", f"relu{index}", f"pool{index}"
        shape = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
        x = add("Conv", conv, [x, *weights(f"{conv}.weight")], f"{conv}.out", **shape)
        statistics = weights(f"{norm}.weight", f"{norm}.bias", f"{norm}.running_mean", f"{norm}.running_var")
        x = add("BatchNormalization", norm, [x, *statistics], f"{norm}.out", epsilon=network.get_submodule(norm).eps)
        x = add("Relu", relu, [x], f"{relu}.out")
        if index in POOL_AFTER:
            x = add("MaxPool", pool, [x], f"{pool}.out", kernel_shape=[2, 2], strides=[2, 2])
    x = add("Flatten", "flatten", [x], "flatten.out", axis=1)
    x = add("Gemm", "fc1", [x, *weights("fc1.weight", "fc1.bias")], "fc1.out", transB=1)
    x = add("Relu", "relu_fc1", [x], "relu_fc1.out")
    add("Gemm", "fc2", [x, *weights("fc2.weight", "fc2.bias")], "logits", transB=1)

    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", *IMAGE_SHAPE])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])
    graph = helper.make_graph(nodes, "digits", [image], [logits], initializers)
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="intaglio-examples-digits")
    model.doc_string = "A convolutional network for scikit-learn's handwritten digits."
    helper.set_model_props(model, {"names": ",".join(str(digit) for digit in range(CLASSES)), "input_range": "0..1"})
    onnx.checker.check_model(model, full_check=True)
    return model


def main() -> None:
    """Train, check that the ONNX file agrees with the network and is accurate enough, and write it."""
    train_part, test_part = load_parts()
    network = train(train_part)
    model = to_onnx(network)

    with torch.no_grad():
        expected = network(torch.from_numpy(test_part.image)).numpy()
    (logits,) = InferenceSession(model.SerializeToString()).run(None, {"image": test_part.image})
    np.testing.assert_allclose(logits, expected, atol=1e-4)  # float32 sums in another order
    accuracy = float(np.mean(logits.argmax(1) == test_part.label))
    print(f"test accuracy {accuracy:.2%} on {len(test_part.label)} images")
    if accuracy < REQUIRED_ACCURACY:
        raise SystemExit(f"test accuracy {accuracy:.2%} is below {REQUIRED_ACCURACY:.0%}; nothing written")
    onnx.save(model, OUTPUT)
    print(f"{OUTPUT}: {OUTPUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
