"""The gate alone, in a plain PyTorch MoE block: no offloader, no Hugging Face, no download."""

import torch
from torch import nn

import moe_gpu


class MoEBlock(nn.Module):
    """Eight small experts behind a gate that prefers the resident ones."""

    def __init__(self, hidden_size: int = 64):
        super().__init__()
        policy = moe_gpu.QualityBudget(0.05)
        self.gate = moe_gpu.MoEGate(hidden_size=hidden_size, num_experts=8, top_k=2, policy=policy)
        self.experts = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits, weights, ids = self.gate(x)
        y = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            token, rank = (ids == expert).nonzero(as_tuple=True)
            y.index_add_(0, token, weights[token, rank, None] * self.experts[expert](x[token]))
        return y


torch.manual_seed(0)
block = MoEBlock()
block.gate.set_resident([0, 3])  # the caller says who is on the device
block(torch.randn(5, 64)).sum().backward()  # gradients reach the router weight too
print(*block.gate.requests(), sep="\n")  # what the gate asks to be moved
metrics = block.gate.metrics()
print(f"{metrics.tokens} tokens, hits {metrics.hit_rate:.1%}, swaps {metrics.swaps}")
