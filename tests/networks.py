"""Networks that several test modules use."""

from torch import Tensor, nn


class Attention(nn.Module):
    """The projections of `nn.MultiheadAttention` are called deep inside torch."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.out(self.attention(x, x, x, need_weights=False)[0])
