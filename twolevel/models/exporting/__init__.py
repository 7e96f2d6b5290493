"""A whole network as a program that needs no twolevel: one for torch alone, or ONNX.

formats.py         which format a file is of, by its name
prepare.py         the network in inference form, by operations of torch alone
torch_program.py   written and loaded by torch.export
onnx_graph.py      written by torch.onnx, loaded by onnxruntime
check.py           what a written file computes, against the network
export.py          all of it, for `twolevel.models.export`
"""
