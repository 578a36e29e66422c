"""A sink that keeps a running mean of what leaves the window (Reward Forcing, arXiv:2512.04678)."""

from __future__ import annotations

from fewstep.causal_video.model.prefix import KeysValues


def ema_sink(sink: KeysValues, evicted: KeysValues, decay: float) -> KeysValues:
    """decay S + (1 - decay) E for keys and values, token by token; after m evictions from S0

        decay^m S0 + (1 - decay) sum_j decay^(m - j) E_j.

    Keys are those before RoPE: keys that were turned by different positions cancel instead of averaging. A segment that
    does not match is an error here; released code overwrites the sink with it.

    Raises:
        ValueError: the evicted segment has another shape.
    """
    if sink.keys.shape != evicted.keys.shape:
        raise ValueError(
            f"a sink of {sink.tokens} tokens cannot average a segment of {evicted.tokens}: chunks must be equal"
        )
    return KeysValues(sink.keys.lerp(evicted.keys, 1 - decay), sink.values.lerp(evicted.values, 1 - decay))
