"""The head of LAION's aesthetic predictor and of ImageReward: five linear layers from an embedding to a score."""

from __future__ import annotations

from torch import Tensor, nn

WIDTHS = (1024, 128, 64, 16)


class ScoreMLP(nn.Module):
    """Linear layers 768-1024-128-64-16-1 without activations, under the published names ``layers.{0,2,4,6,7}``.

    Both published models train with dropout after the first three layers; it holds no weights and is the identity when
    scoring, so only its places (1, 3 and 5) are kept. Source: the two projects' checkpoints (arXiv:2304.05977;
    github.com/christophschuhmann/improved-aesthetic-predictor).
    """

    def __init__(self, dim: int = 768) -> None:
        super().__init__()
        first, second, third, fourth = WIDTHS
        self.layers = nn.Sequential(
            nn.Linear(dim, first),
            nn.Identity(),
            nn.Linear(first, second),
            nn.Identity(),
            nn.Linear(second, third),
            nn.Identity(),
            nn.Linear(third, fourth),
            nn.Linear(fourth, 1),
        )

    def forward(self, embeddings_BD: Tensor) -> Tensor:
        """Embeddings [B, dim] in the dtype of the weights -> scores [B]."""
        scores_B1: Tensor = self.layers(embeddings_BD)
        return scores_B1.squeeze(-1)
