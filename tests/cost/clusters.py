"""Random hardware for tests of costs."""

from __future__ import annotations

from hypothesis import strategies as st

from moec.cost import Device, Hardware, Link, Way


def seconds(most: float = 1e-4) -> st.SearchStrategy[float]:
    """Latencies."""
    return st.floats(0.0, most, allow_subnormal=False)


def speeds(least: float = 1e9, most: float = 1e12) -> st.SearchStrategy[float]:
    """Bandwidths."""
    return st.floats(least, most)


@st.composite
def devices(draw: st.DrawFn) -> Device:
    """A device with units, tiles and a cache, or a plain one."""
    tiled = draw(st.booleans())
    return Device(
        name="drawn",
        memory=1e12,
        bandwidth=draw(speeds()),
        launch=draw(seconds()),
        host=draw(st.sampled_from([0.0, 5e-6])),
        peak={"float32": draw(speeds(1e10, 1e14)), "bfloat16": draw(speeds(1e10, 1e15))},
        units=draw(st.integers(1, 132)) if tiled else 1,
        tiles=((128, 128), (64, 64), (16, 32)) if tiled else (),
        cache=draw(st.sampled_from([0.0, 1e6])) if tiled else 0.0,
        cache_bandwidth=draw(speeds(1e12, 1e13)) if tiled else None,
        product_share=draw(st.floats(0.1, 1.0)),
        memory_share=draw(st.floats(0.1, 1.0)),
    )


@st.composite
def ways(draw: st.DrawFn) -> tuple[Way, ...]:
    """None, or several ways of every algorithm."""
    if draw(st.booleans()):
        return ()
    found: list[Way] = []
    for algorithm in ("ring", "ring", "tree", "direct"):
        found.append(
            Way(
                name=f"{algorithm} {len(found)}",
                algorithm=algorithm,
                start=draw(seconds()),
                inside=draw(seconds()),
                between=draw(seconds()),
                share=draw(st.floats(0.1, 1.0)),
                parallel=draw(st.integers(1, 16)),
            )
        )
    return tuple(found)


@st.composite
def clusters(draw: st.DrawFn, least_nodes: int = 1) -> Hardware:
    """One to four nodes of one to eight devices."""
    per_node = draw(st.sampled_from([1, 2, 4, 8]))
    return Hardware(
        device=draw(devices()),
        inside=Link(latency=draw(seconds()), bandwidth=draw(speeds())),
        between=Link(latency=draw(seconds()), bandwidth=draw(speeds())),
        per_node=per_node,
        nodes=draw(st.integers(least_nodes, 4)),
        cards=draw(st.sampled_from([None, 1, per_node])),
        ways=draw(ways()),
    )
