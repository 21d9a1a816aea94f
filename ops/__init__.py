"""What a weight can become, and what an op means.

`families` say how an operator reads its weight, `decompositions` how a weight falls into factors, `storage` how an array
lies in the file and which small ONNX program expands it at load. A `Form` is one combination of the three. Nothing here
knows about whole models.
"""
