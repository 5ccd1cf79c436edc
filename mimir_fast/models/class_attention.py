"""Class attention (CaiT, arXiv 2103.17239; XCiT, arXiv 2106.09681): only the cls token asks. timm's parameter names.

Shapes: B images, T tokens with cls first, D width, H heads, E = D/H.
"""

from torch import Tensor, nn

from mimir_fast.layers.attention import attention
from mimir_fast.models.blocks import check_heads


class ClassAttention(nn.Module):
    """What the cls token gathers from all tokens, itself among them."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.heads = (num_heads, dim // num_heads)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The new cls token (B, 1, D) from all tokens (B, T, D), cls first."""
        q, k, v = (
            project(x).unflatten(-1, self.heads)
            for project, x in ((self.q, x_BTD[:, :1]), (self.k, x_BTD), (self.v, x_BTD))
        )
        return self.proj(attention(q, k, v).flatten(2))

    def attention_map(self, x_BTD: Tensor) -> Tensor:
        """(B, H, 1, T): what the cls token takes from each, for pictures."""
        q, k = (
            project(x).unflatten(-1, self.heads).transpose(1, 2)
            for project, x in ((self.q, x_BTD[:, :1]), (self.k, x_BTD))
        )
        return (q @ k.mT * self.heads[1] ** -0.5).float().softmax(dim=-1)
