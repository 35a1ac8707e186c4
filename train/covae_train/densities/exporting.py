"""Whether torch is tracing a graph for export: then no value is looked at, and every operator needs an ONNX form."""

from __future__ import annotations

import torch


def exporting() -> bool:
    """True while torch.export or torch.onnx traces."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()
