"""A runtime that is never there."""


class Nothing:
    name = "nothing"

    def missing(self) -> str | None:  # why it cannot run here; None where it can
        return "there is nothing to run"

    def version(self) -> str:
        return ""
