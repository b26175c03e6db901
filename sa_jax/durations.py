"""Human-readable durations."""


def duration(seconds: float) -> str:
  """A human-readable duration, such as ``3 min`` or ``2 h 05 min``."""
  minutes = round(seconds / 60)
  if seconds < 0.5:
    return "under 1 s"
  if seconds < 90:
    return f"{seconds:.0f} s"
  return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
