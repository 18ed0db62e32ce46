"""How far the making of accompaniments is on the whole, out of what the pipeline tells of its stages."""

# Share of the computing time of each stage.
_TOGETHER = {"listen": 5, "compose": 45}  # once for all variations
_EACH = {"paint": 30, "sound": 15, "mix": 5}
STAGE_NAMES = {
    "listen": "listening",
    "compose": "composing",
    "paint": "playing",
    "sound": "sounding",
    "mix": "mixing",
}


class WholeProgress:
    """Makes one share of all the work out of shares of stages."""

    def __init__(self, renderings: int) -> None:
        self._once, self._each = sum(_TOGETHER.values()), sum(_EACH.values())
        self._total = self._once + self._each * renderings
        self._finished, self._stage = 0, ""

    def tell(self, stage: str, share: float) -> float:
        """Return the share of all (0 to 1) where a stage is at a share of its own.

        The last stages come again for every accompaniment.
        """
        stages, place = (_TOGETHER, 0) if stage in _TOGETHER else (_EACH, self._once)
        names = list(stages)
        self._finished += (self._stage, stage) == (list(_EACH)[-1], list(_EACH)[0])
        self._stage = stage
        place += sum(stages[name] for name in names[: names.index(stage)])
        return (place + self._each * self._finished + share * stages[stage]) / self._total
