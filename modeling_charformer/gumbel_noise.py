"""Random numbers that belong to a place in a text, by which it is sampled."""

import torch
from torch import Tensor


# Noise is drawn for so many places of a text at once, or for fewer, so that these are no more numbers than this.
PLACES_AT_ONCE, NUMBERS_AT_ONCE = 16, 2**18


class GumbelNoise:
    """Noise whose maximum, added to log-probabilities, is a sample of them; one draw for each row and place in the text.

    It has a separate generator, so that the rest of the program sees one random number taken, however much is drafted.
    """

    def __init__(self) -> None:
        self.seed = int(torch.randint(2**62, ()))
        self.drawn: Tensor | None = None
        self.begin = 0

    def at(self, places: list[int], numbers: list[int], offset: int, count: int, like: Tensor) -> Tensor:
        """`(B, count, V)`, of the type of `like`, for the places from `offset` after each row's next one on.

        `like` is `(B, ..., V)`. `numbers` are the indices of the rows in the batch; the first call holds all rows. The
        next places of a later call may not lie before the lowest of these.
        """
        low, high = min(places), max(places) + offset + count
        rows, size = like.shape[0] if self.drawn is None else self.drawn.shape[1], like.shape[-1]
        if self.drawn is None:
            self.generator = torch.Generator(like.device).manual_seed(self.seed)
            self.drawn = like.new_empty(0, rows, size)
        while self.begin + self.drawn.shape[0] < high:
            # So many places at once, whatever is asked for: the numbers must not depend on how many are drafted.
            places_at_once = max(1, min(PLACES_AT_ONCE, NUMBERS_AT_ONCE // (rows * size)))
            new = like.new_empty(places_at_once, rows, size).exponential_(generator=self.generator).log_().neg_()
            self.drawn, self.begin = torch.cat([self.drawn[low - self.begin :], new]), low
        if len(places) == 1:
            first, row = low - self.begin + offset, numbers[0]
            return self.drawn[first : first + count, row : row + 1].transpose(0, 1)
        steps = torch.arange(offset, offset + count, device=like.device)
        at = torch.tensor(places, device=like.device)[:, None] - self.begin + steps
        return self.drawn[at, torch.tensor(numbers, device=like.device)[:, None]]
