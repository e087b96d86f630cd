"""The tables. Times are seconds since 1970 in UTC; lists and objects are JSON; votes and events are only ever added."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
)

METADATA = MetaData()
SERIAL = BigInteger().with_variant(Integer, "sqlite")

SCHEMA_VERSION = Table(
    "schema_version", METADATA, Column("version", Integer, primary_key=True), Column("at", Float, nullable=False)
)

PROJECT = Table(
    "project",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("name", String(200), nullable=False, unique=True),
    Column("kind", String(10), nullable=False),
    Column("protocol", Text, nullable=False),
    Column("guideline_version", Integer, nullable=False),
    Column("is_open", Boolean, nullable=False, default=True),
    Column("salt", String(64), nullable=False),
    Column("batches", Integer, nullable=False, default=0),
    Column("freed", BigInteger, nullable=False, default=0),
    Column("num_items", Integer, nullable=False, default=0),
    Column("num_wanted", Integer, nullable=False, default=0),
    Column("num_counted", Integer, nullable=False, default=0),
    Column("created_at", Float, nullable=False),
)

GUIDELINE = Table(
    "guideline",
    METADATA,
    Column("project", ForeignKey("project.id"), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("text", Text, nullable=False),
    Column("created_at", Float, nullable=False),
)

SOURCE = Table(
    "source",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("project", ForeignKey("project.id"), nullable=False),
    Column("batch", Integer, nullable=False),
    Column("description", Text, nullable=False),
    Column("added_at", Float, nullable=False),
)

ITEM = Table(
    "item",
    METADATA,
    Column("id", SERIAL, primary_key=True),
    Column("project", ForeignKey("project.id"), nullable=False),
    Column("source", ForeignKey("source.id"), nullable=False),
    Column("comparison", Text, nullable=False),  # the id that the row has in the data
    Column("content_hash", String(64), nullable=False),
    Column("k", Integer, nullable=False),
    Column("row", Text, nullable=False),
    Column("role", String(12), nullable=False),  # ordinary, gold, calibration
    Column("answer", Text),
    Column("explanation", Text),
    Column("want", Integer, nullable=False),
    Column("slots_left", Integer, nullable=False),  # want less those who hold or have judged it; 0 for gold and calibration
    Column("priority", Float),
    Column(
        "steered", Boolean, nullable=False, server_default=false()
    ),  # handed out for its priority, or wanted more: not random
    Column("position", BigInteger, nullable=False),
    Column("shuffle", Integer, nullable=False),
    Column("freed", BigInteger, nullable=False, default=0),
    UniqueConstraint("project", "content_hash"),
)
Index(
    "item_free", ITEM.c.project, ITEM.c.position, sqlite_where=text("slots_left > 0"), postgresql_where=text("slots_left > 0")
)
Index("item_freed", ITEM.c.project, ITEM.c.freed, sqlite_where=text("slots_left > 0"), postgresql_where=text("slots_left > 0"))
PRIORITISED = text("slots_left > 0 AND priority IS NOT NULL")
Index("item_prioritised", ITEM.c.project, ITEM.c.priority, sqlite_where=PRIORITISED, postgresql_where=PRIORITISED)
KNOWN = text("role <> 'ordinary'")
Index("item_known", ITEM.c.project, ITEM.c.role, ITEM.c.shuffle, sqlite_where=KNOWN, postgresql_where=KNOWN)
Index("item_comparison", ITEM.c.project, ITEM.c.comparison)

MEDIA = Table(
    "media",
    METADATA,
    Column("key", String(32), primary_key=True),  # random: it tells nothing
    Column("project", ForeignKey("project.id"), nullable=False),
    Column("sha256", String(64), nullable=False),  # of the file as it was added
    Column("path", Text),
    Column("mime", String(40), nullable=False),
    Column("width", Integer, nullable=False),
    Column("height", Integer, nullable=False),
    Column("num_bytes", BigInteger, nullable=False),
    UniqueConstraint("project", "sha256"),
)

BLOB = Table(
    "blob", METADATA, Column("media", ForeignKey("media.key"), primary_key=True), Column("data", LargeBinary, nullable=False)
)

ANNOTATOR = Table(
    "annotator",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("name", String(100), nullable=False),
    Column("folded", String(200), nullable=False, unique=True),
    Column("role", String(12), nullable=False),
    Column("password", Text),  # scrypt; none: cannot sign in with a password
    Column("active", Boolean, nullable=False, default=True),
    Column("created_at", Float, nullable=False),
)

SESSION = Table(
    "session",
    METADATA,
    Column("token", String(64), primary_key=True),  # sha256 of what the browser holds
    Column("annotator", ForeignKey("annotator.id"), nullable=False, index=True),
    Column("created_at", Float, nullable=False),
    Column("seen_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
)

THROTTLE = Table(
    "throttle",
    METADATA,
    Column("subject", String(64), primary_key=True),  # sha256 of a name or an address
    Column("failures", Integer, nullable=False),
    Column("last_at", Float, nullable=False),
)

PARTICIPATION = Table(
    "participation",
    METADATA,
    Column("project", ForeignKey("project.id"), primary_key=True),
    Column("annotator", ForeignKey("annotator.id"), primary_key=True),
    Column("cursor", BigInteger, nullable=False, default=-1),
    Column("freed_cursor", BigInteger, nullable=False),
    Column("num_taken", Integer, nullable=False, default=0),
    Column("num_votes", Integer, nullable=False, default=0),
    Column("num_skips", Integer, nullable=False, default=0),
    Column("calibration_taken", Integer, nullable=False, default=0),
    Column("calibration_done", Integer, nullable=False, default=0),
    Column("calibration_right", Integer, nullable=False, default=0),
    Column("reopened", String(32)),
    Column("guideline_read", Integer),
    Column("started_at", Float, nullable=False),
)

ASSIGNMENT = Table(
    "assignment",
    METADATA,
    Column("id", String(32), primary_key=True),  # random
    Column("project", ForeignKey("project.id"), nullable=False),
    Column("item", ForeignKey("item.id"), nullable=False),
    Column("annotator", ForeignKey("annotator.id"), nullable=False),
    Column("kind", String(12), nullable=False),  # random, active, gold, repeat, calibration
    Column("shown_order", String(20), nullable=False),  # which candidate stands at each place: [1, 0]
    Column("state", String(10), nullable=False),  # leased, expired, released, voted
    Column("holds", Boolean, nullable=False),  # whether it takes one of the item's slots
    Column("number", Integer, nullable=False),  # the annotator's how-manieth
    Column("vote_number", Integer),
    Column("revision", Integer, nullable=False, default=0),  # the latest vote's; 0: none
    Column("repeats", ForeignKey("assignment.id")),
    Column("repeated", Boolean, nullable=False, default=False),
    Column("guideline_version", Integer, nullable=False),
    Column("leased_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("displayed_at", Float),
)
ONCE = text("repeats IS NULL")
Index("assignment_once", ASSIGNMENT.c.item, ASSIGNMENT.c.annotator, unique=True, sqlite_where=ONCE, postgresql_where=ONCE)
Index("assignment_repeat", ASSIGNMENT.c.repeats, unique=True)
LEASED = text("state = 'leased'")
Index("assignment_leased", ASSIGNMENT.c.project, ASSIGNMENT.c.expires_at, sqlite_where=LEASED, postgresql_where=LEASED)
Index("assignment_mine", ASSIGNMENT.c.project, ASSIGNMENT.c.annotator, ASSIGNMENT.c.number, unique=True)
Index("assignment_open", ASSIGNMENT.c.annotator, ASSIGNMENT.c.project, sqlite_where=LEASED, postgresql_where=LEASED)
Index("assignment_voted", ASSIGNMENT.c.project, ASSIGNMENT.c.annotator, ASSIGNMENT.c.vote_number)

VOTE = Table(
    "vote",
    METADATA,
    Column("id", SERIAL, primary_key=True),
    Column("assignment", ForeignKey("assignment.id"), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("project", ForeignKey("project.id"), nullable=False),
    Column("verdict", Text, nullable=False),  # canonical
    Column("shown", Text, nullable=False),
    Column("late", Boolean, nullable=False),
    Column("surplus", Boolean, nullable=False),
    Column("dwell_ms", Integer),
    Column("displayed_at", Float, nullable=False),
    Column("submitted_at", Float, nullable=False),
    Column("guideline_version", Integer, nullable=False),
    Column("app_version", String(40), nullable=False),
    UniqueConstraint("assignment", "revision"),
)
Index("vote_project", VOTE.c.project, VOTE.c.id)

EVENT = Table(
    "event",
    METADATA,
    Column("id", SERIAL, primary_key=True),
    Column("at", Float, nullable=False),
    Column("kind", String(20), nullable=False),
    Column("project", Integer, index=True),
    Column("annotator", Integer),
    Column("assignment", String(32)),
    Column("details", Text, nullable=False),
)
