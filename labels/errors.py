"""The one error a user is meant to read: what is wrong, what is allowed, and how to mend it."""


class UserError(Exception):
    """A mistake in the input, the configuration or the machine, told so that it can be mended.

    Args:
        problem: names the thing and the value that is wrong.
        allowed: what would have been right, if that can be said in a line.
        mend: the command or the change that puts it right.
    """

    def __init__(self, problem: str, *, allowed: str | None = None, mend: str | None = None) -> None:
        self.problem, self.allowed, self.mend = problem, allowed, mend
        lines = [problem]
        if allowed:
            lines.append(f"  allowed: {allowed}")
        if mend:
            lines.append(f"  mend: {mend}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the three parts when the error crosses a process border."""
        return (_rebuild, (self.problem, self.allowed, self.mend))


def _rebuild(problem: str, allowed: str | None, mend: str | None) -> UserError:
    return UserError(problem, allowed=allowed, mend=mend)
