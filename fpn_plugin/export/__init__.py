"""Trained models as files that run without this plugin: TorchScript, `torch.export`, ONNX."""
