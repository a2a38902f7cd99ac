"""What tests of pairs of texts share."""

import numpy as np

from tasks.dialogue.near_duplicates import Count


class Remembered(dict[bytes, float]):
    """What was counted of pairs, by their digests."""

    def through(self, names: np.ndarray, count: Count) -> np.ndarray:
        keys = [name.tobytes() for name in names]
        places = np.array([at for at, key in enumerate(keys) if key not in self], dtype=np.int64)
        self.update(zip([keys[at] for at in places], count(places).tolist(), strict=True))
        return np.array([self[key] for key in keys])
