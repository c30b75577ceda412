"""How the bucket must be, and what is wrong with the one that is there. Pure: it asks nobody.

Two kinds of wrong. *Impossible*: no heartbeat could be written at all. *Problem*: writes work, but what was
acknowledged may be lost or answered from an old copy; nobody promotes by such a store, and whoever leads goes on.
"""

from __future__ import annotations

HISTORY = 64
# Compare-and-set of one key under a leader change is only right since 2.11 (nats-server pull request 6194), and
# whole streams were lost when servers were killed in 2.10.20 to 2.10.22 (issue 6888). Both is what all rests on.
MINIMUM_VERSION = (2, 11)

type_json = dict[str, object]


def wanted(bucket: str, replicas: int) -> type_json:
    """The stream's configuration, as it is made."""
    return {
        "name": f"KV_{bucket}",
        "subjects": [f"$KV.{bucket}.>"],
        "storage": "file",
        "retention": "limits",
        "discard": "new",
        "max_msgs_per_subject": HISTORY,
        "max_age": 0,
        "max_msgs": -1,
        "max_bytes": -1,
        "num_replicas": replicas,
        "allow_direct": False,
        "deny_delete": True,
        "deny_purge": True,
        "allow_rollup_hdrs": False,
    }


def impossible(config: type_json, bucket: str) -> list[str]:
    """Why nothing can be written there, in words; empty: it can."""
    subjects = [f"$KV.{bucket}.>"]
    found = config.get("subjects")
    wrong = [f"subjects is {found}, must be {subjects}"] if found != subjects else []
    return wrong + [
        f"{name} is set, must not be" for name in ("sealed", "no_ack", "mirror") if config.get(name)
    ]


def problems(config: type_json, replicas: int) -> list[str]:
    """What is weaker than Harmony needs it."""
    exactly: type_json = {
        "storage": "file",
        "retention": "limits",
        "max_age": 0,
        "max_msgs": -1,
        "max_bytes": -1,
        "allow_direct": False,
    }
    absent: type_json = {"max_age": 0, "max_msgs": -1, "max_bytes": -1, "allow_direct": False}
    found = [
        f"{name} is {config.get(name, absent.get(name))}, must be {must}"
        for name, must in exactly.items()
        if config.get(name, absent.get(name)) != must
    ]
    history, copies = _number(config.get("max_msgs_per_subject", -1)), _number(config.get("num_replicas", 1))
    if 0 <= history < HISTORY:
        found.append(f"max_msgs_per_subject is {history}, must be at least {HISTORY}")
    if copies < replicas:
        found.append(f"num_replicas is {copies}, must be {replicas} (store.replicas) or more")
    if config.get("persist_mode", "default") != "default":
        found.append(
            f"persist_mode is {config['persist_mode']}, must be default: it acknowledges before it stores"
        )
    return found


def too_old(version: tuple[int, int] | None) -> list[str]:
    """What is wrong with the server's version (major, minor); None: it does not say."""
    least = ".".join(str(n) for n in MINIMUM_VERSION)
    if version is None:
        return [f"the server does not say its version, {least} or newer is needed"]
    if version >= MINIMUM_VERSION:
        return []
    return [f"the server is of version {version[0]}.{version[1]}, {least} or newer is needed"]


def gone(bucket: str) -> str:
    """Of a bucket that this node has seen."""
    return (
        f"the bucket {bucket} is gone, which this node has seen: its history is lost, and it is not made again. "
        "Restore it, or accept the loss (harmonyctl store accept)"
    )


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0
