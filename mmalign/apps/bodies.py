"""What the judging page sends, checked: every field has a type, a range and a length."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from mmalign.annotation.protocol import LONGEST_RATIONALE, MOST_CANDIDATES, Verdict

Name = Annotated[str, StringConstraints(max_length=100)]
Key = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[\w-]+$")]
Place = Annotated[int, Field(ge=0, lt=MOST_CANDIDATES)]
Rank = Annotated[int, Field(ge=1, le=MOST_CANDIDATES)]
DAY_MS = 24 * 3600 * 1000


class Body(BaseModel):
    """A JSON object whose further keys are passed over, so that an older page can talk to a newer server."""

    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)


class SignInBody(Body):
    """Name and password."""

    name: Name
    password: Annotated[str, StringConstraints(max_length=2000)]

    def __repr__(self) -> str:
        """Tell the name alone."""
        return f"SignInBody(name={self.name!r})"


class PasswordBody(Body):
    """A person's own password, the old and the new one."""

    old: Annotated[str, StringConstraints(max_length=2000)]
    new: Annotated[str, StringConstraints(max_length=2000)]

    def __repr__(self) -> str:
        """Tell nothing."""
        return "PasswordBody()"


class AssignmentBody(Body):
    """The assignment that is on the screen."""

    assignment: Key


class UndoBody(Body):
    """Which judgement is opened again; none: the last."""

    assignment: Key | None = None


class GuidelineBody(Body):
    """The version of the instructions that was read."""

    version: Annotated[int, Field(ge=1, le=1_000_000)]


class VoteBody(Body):
    """A vote as shown, with the assignment and revision that were on the screen; with `ranks` the choice may be left out."""

    assignment: Key
    revision: Annotated[int, Field(ge=1, le=1_000_000)]
    choice: Literal["left", "right", "tie", "both_bad", "skip", "ranks"] = "ranks"
    ranks: Annotated[tuple[Annotated[int, Field(ge=1, le=MOST_CANDIDATES)], ...], Field(max_length=MOST_CANDIDATES)] | None = (
        None
    )
    strength: Annotated[int, Field(ge=-3, le=3)] | None = None
    aspects: Annotated[dict[Name, Name], Field(max_length=50)] = {}
    flags: Annotated[dict[Name, Annotated[tuple[Place, ...], Field(max_length=MOST_CANDIDATES)]], Field(max_length=50)] = {}
    rationale: Annotated[str, StringConstraints(max_length=LONGEST_RATIONALE)] = ""
    dwell_ms: Annotated[int, Field(ge=0)] | None = None
    app_version: Annotated[str, StringConstraints(max_length=50)] = ""

    def verdict(self) -> Verdict:
        """Return what was answered."""
        entry: dict[str, Any] = {
            name: getattr(self, name) for name in ("choice", "strength", "ranks", "aspects", "flags", "rationale")
        }
        return Verdict(**entry)

    @property
    def dwell(self) -> int | None:
        """Time on the screen in ms, at most a day: a browser's clock may jump."""
        return None if self.dwell_ms is None else min(self.dwell_ms, DAY_MS)
