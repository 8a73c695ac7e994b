"""Small statistics that more than one script reports."""


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95% interval of a share seen in `count` independent trials (Wilson 1927); stays inside [0, 1]."""
    z = 1.959964
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)
