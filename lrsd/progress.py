"""How long work tells that it is getting on."""


class Progress:
    """Says nothing; the command line replaces it by bars or log lines."""

    def stage(self, name: str, steps: int) -> None:
        """A stage of `steps` steps begins."""

    def step(self, what: str) -> None:
        """One step of the current stage is done."""

    def note(self, text: str) -> None:
        """Something worth a line of its own."""
