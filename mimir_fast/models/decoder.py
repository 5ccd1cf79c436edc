"""From the latent back to patches: the light transformer of a masked autoencoder, or SimMIM's linear layer.

Names are MAE's and the MIMIR authors'. A family whose authors decode with blocks of their own overrides `build_block`
and `run` (and, for another position embedding, `positions`) in its own file.
Shapes: B batch, N patches, K visible, M wanted ones, P numbers a patch, D encoder width, E decoder width.
"""

import torch
from torch import Tensor, nn

from mimir_fast.layers.linear import linear
from mimir_fast.layers.norms import LayerNorm
from mimir_fast.models.blocks import Block, init_like_mae
from mimir_fast.models.encoder import Encoder
from mimir_fast.models.positions import sincos_positions
from mimir_fast.ops.patches import gather_patches, scatter_patches
from mimir_fast.ops.positions import add_positions, behind_prefix


class Decoder(nn.Module):
    """Mask tokens in the empty places, a few blocks over all of them, a linear head on the wanted ones."""

    def __init__(self, encoder: Encoder, width: int, depth: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.num_prefix, self.num_patches, self.grid = encoder.num_prefix, encoder.num_patches, encoder.grid
        self.mlp_ratio = mlp_ratio
        # As in MAE's and transformers' code, norms and activation are the encoder's.
        self.eps, self.gelu = encoder.options.get("eps", 1e-6), encoder.options.get("gelu", "erf")
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        positions = sincos_positions(width, encoder.grid, num_prefix=self.num_prefix)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_embed = nn.Linear(encoder.width, width)
        self.decoder_blocks = nn.ModuleList(self.build_block(width, num_heads) for _ in range(depth))
        self.decoder_norm = LayerNorm(width, self.eps)
        self.decoder_pred = nn.Linear(width, encoder.patch_dim)
        self.apply(init_like_mae)
        nn.init.normal_(self.mask_token, std=0.02)

    def build_block(self, width: int, num_heads: int) -> nn.Module:
        """One block; families override this."""
        return Block(width, num_heads, self.mlp_ratio, eps=self.eps, gelu=self.gelu)

    def layers(self) -> list[nn.Module]:
        """The blocks, in their order: what is compiled and sharded one by one."""
        return list(self.decoder_blocks)

    @property
    def takes_parts(self) -> bool:
        """Whether the blocks take any set of patches; families with a `run` of their own count on the whole grid."""
        return type(self).run is Decoder.run

    def forward(self, latent_BTD: Tensor, places_BK: Tensor | None, ids_BM: Tensor | None = None) -> Tensor:
        """Predicted patches (B, M, P) at the places `ids_BM`, or (B, N, P) everywhere when it is None."""
        x, positions, F = linear(self.decoder_embed, latent_BTD), self.positions(), self.num_prefix
        if F and len(positions) == self.num_patches:  # the prefix has none
            positions = nn.functional.pad(positions, (0, 0, F, 0))
        if places_BK is None:
            x = x + positions.to(x.dtype)
        elif ids_BM is None or x.shape[1] - F + ids_BM.shape[1] == self.num_patches or not self.takes_parts:
            x = scatter_patches(x, behind_prefix(places_BK, F), self.mask_token[0, 0], positions)
        else:  # nobody asks for the other patches: attention takes what there is, in any order
            x = add_positions(x, behind_prefix(places_BK, F), positions)
            wanted = self.mask_token.to(x.dtype) + positions[ids_BM + F].to(x.dtype)
            ids_BM = torch.arange(ids_BM.shape[1], device=x.device).expand_as(ids_BM) + (x.shape[1] - F)
            x = torch.cat([x, wanted], dim=1)
        return linear(self.decoder_pred, self.run(x, ids_BM), norm=self.decoder_norm)

    def positions(self) -> Tensor:
        """(N, E), or (prefix + N, E) where the prefix has a position too."""
        return self.decoder_pos_embed[0]

    def run(self, x: Tensor, ids_BM: Tensor | None) -> Tensor:
        """(B, M or N, E) from all rows (B, prefix + N, E): the blocks. The last one computes the wanted tokens only."""
        queries = None if ids_BM is None else ids_BM + self.num_prefix
        *first, last = self.decoder_blocks
        for block in first:
            x = block(x)
        x = last(x, query_ids_BQ=queries)
        return x[:, self.num_prefix :] if queries is None else x


class LinearDecoder(nn.Module):
    """SimMIM's head (arXiv 2111.09886): one linear layer from a token to its patch. The encoder saw the mask tokens."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.num_prefix = encoder.num_prefix
        self.decoder_pred = nn.Linear(encoder.width, encoder.patch_dim)
        self.apply(init_like_mae)

    def layers(self) -> list[nn.Module]:
        """No blocks: an empty list."""
        return []

    def forward(self, latent_BTD: Tensor, places_BK: Tensor | None, ids_BM: Tensor | None = None) -> Tensor:
        """Predicted patches (B, M, P) at the places `ids_BM`, or (B, N, P) everywhere when it is None."""
        x = latent_BTD[:, self.num_prefix :]
        return self.decoder_pred(x if ids_BM is None else gather_patches(x, ids_BM))
