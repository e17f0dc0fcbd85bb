"""Counter-based random numbers: token t of a sequence draws from (seed, t) alone.

What a sequence draws therefore does not depend on which others are decoded beside it, nor on the order in which
they end. SplitMix64 (Steele, Lea, Flood 2014, 'Fast splittable pseudorandom number generators') as the mixer.
"""

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def stream_seed(seed: int, index: int) -> int:
    """Seed of the index-th stream under ``seed``; uint64."""
    z = np.array([(seed + (index + 1) * _GOLDEN) & _MASK], dtype=np.uint64)
    return int(_mix(z)[0])


def uniforms(seeds: np.ndarray, counters: np.ndarray) -> np.ndarray:
    """One number in [0, 1) for each (seed, counter). seeds: uint64 [n]; counters: int64 [n]; float64 [n]."""
    z = seeds + (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)
    return (_mix(z) >> np.uint64(11)).astype(np.float64) * 2.0**-53
