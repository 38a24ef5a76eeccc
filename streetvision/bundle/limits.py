"""What a bundle may cost at most, whoever made it; `docs/limits.md` has the table of all bounds."""

from __future__ import annotations

# `bundle.json` and the policy: those that are exported have some kilobytes.
MAX_JSON_BYTES = 4 * 2**20
# Of any file: a billion weights in float32.
MAX_FILE_BYTES = 4 * 2**30
# An export writes nine, and `bundle.json`; the schema has the same number.
MAX_FILES = 16
# Pixels of the network's input: of all views of an image, and of a batch of single views. 130 views (8 × 8
# tiles, mirrored) of 224 pixels are a fifth of it.
MAX_PASS_PIXELS = 2**25
# Floating-point operations of an image, all views: what a ViT-L takes for 130 views of 224 pixels.
MAX_OPERATIONS = 2 * 10**13
# Of an ONNX model without its weights; those of 2,000 operators have half a megabyte.
MAX_GRAPH_BYTES = 8 * 2**20
# Intermediate results of an ONNX model: so much, and so much more for each number of its inputs (a ViT-B of 512
# pixels whose attention is not fused: 200) and each byte of the file (int8 weights become float32: 4).
GRAPH_BASE_BYTES = 64 * 2**20
GRAPH_BYTES_A_NUMBER = 1024
GRAPH_BYTES_A_BYTE = 8
# Weights hardly compress: an archive that unpacks to more than so many times its size, and so many bytes, is a
# bomb.
MAX_RATIO = 20
MAX_RATIO_EXTRA_BYTES = 64 * 2**20
