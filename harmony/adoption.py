"""What is looked at before a running primary is adopted: it, the other members, and the store. Changes nothing.

A *problem* stands against adopting; a *remark* is for the operator to know. What only the fencer can judge
(whether a reload brings Harmony's settings in) is asked of it by cli/adopt.py.
"""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from harmony import session
from harmony.config import Config
from harmony.decoding import Unreadable
from harmony.errors import in_a_line
from harmony.records import ClusterState, Member, decode_cluster, decode_member
from harmony.store.interface import Entry

CONNECT_S = 3
VERSIONS = range(13, 19)
_HERE = """
SELECT pg_is_in_recovery(), current_setting('server_version_num')::int / 10000, current_setting('data_directory'),
       (SELECT system_identifier::text FROM pg_control_system()),
       current_setting('wal_level'), current_setting('max_wal_senders')::int, current_setting('hot_standby'),
       current_setting('wal_log_hints') = 'on' OR current_setting('data_checksums') = 'on',
       current_setting('listen_addresses'), current_setting('synchronous_standby_names'),
       (SELECT rolcanlogin AND rolreplication FROM pg_roles WHERE rolname = %(replication)s),
       (SELECT pg_has_role(current_user, 'pg_monitor', 'USAGE')),
       ARRAY(SELECT application_name || ' as ' || usename || ' from ' || COALESCE(host(client_addr), 'this host')
               FROM pg_stat_replication WHERE state = 'streaming')
"""


@dataclass
class Findings:
    """In the order of looking. `system_identifier`: of the PostgreSQL here, "" where it does not answer."""

    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    system_identifier: str = ""


@contextlib.contextmanager
def _as_the_agent(c: Config) -> Iterator[None]:
    """Root connects as whom the agent will connect: pg_hba.conf's peer rule looks at nothing else.

    Of the whole process, so for the connecting alone. Who is not root stays who he is.
    """
    if c.agent.user is None or os.geteuid() != 0:
        yield
        return
    os.seteuid(pwd.getpwnam(c.agent.user).pw_uid)
    try:
        yield
    finally:
        os.seteuid(0)


def _how_to_let_in(c: Config, refused: str) -> str:
    """What to do about a connection that was refused. Pure."""
    role, agent = c.postgresql.db_user, c.agent.user or "root"
    if "peer" in refused.lower():  # PostgreSQL's word, in whatever language
        return (
            f"pg_hba.conf's rule peer lets in who is named like the role, and the agent runs as {agent}: set "
            f'agent.user to an OS user "{role}" (useradd --system {role}), or map {agent} to {role} in pg_ident.conf'
        )
    return (
        f"CREATE ROLE {role} LOGIN; GRANT pg_monitor TO {role}, if there is no such role; have pg_hba.conf let it in; "
        "or correct postgresql.socket_dir, db_user, db_name, or the members' port"
    )


def look_here(c: Config, found: Findings) -> None:
    """The PostgreSQL on this host, by SQL as the agent asks it. Blocks for CONNECT_S at most."""
    p, me = c.postgresql, c.node.name
    try:
        with _as_the_agent(c):
            link = session.connect(
                host=p.socket_dir, port=c.members[me].port, user=p.db_user, dbname=p.db_name,
                timeout_s=CONNECT_S, application_name="harmonyctl adopt",
            )  # fmt: skip
        with link:
            row = link.execute(_HERE, {"replication": p.replication_user}).fetchone()
    except psycopg.Error as e:
        found.problems.append(
            f"PostgreSQL here cannot be asked as {p.db_user} through {p.socket_dir}, port {c.members[me].port}: "
            f"{in_a_line(e)} ({_how_to_let_in(c, str(e))})"
        )
        return
    if row is None:
        raise AssertionError("a SELECT without FROM gave no row")
    judge(c, row, found)


def judge(c: Config, row: Sequence[object], found: Findings) -> None:
    """What _HERE's row says of the PostgreSQL on this host. Pure."""
    p, me = c.postgresql, c.node.name
    (
        recovering,
        version,
        data,
        system,
        level,
        senders,
        hot,
        rewindable,
        listens,
        names,
        role,
        monitor,
        streams,
    ) = row
    found.system_identifier = str(system)
    problems, remarks = found.problems, found.remarks
    if recovering:
        problems.append(f"PostgreSQL on {me} is a standby: run adopt where the primary runs")
    if version not in VERSIONS:
        problems.append(f"PostgreSQL {version} is none of {VERSIONS[0]} to {VERSIONS[-1]}")
    if Path(str(data)).resolve() != Path(p.data_dir).resolve():
        problems.append(f"it runs from {data}, postgresql.data_dir says {p.data_dir}")
    if not monitor:
        problems.append(f"{p.db_user} is no member of pg_monitor: GRANT pg_monitor TO {p.db_user}")
    if not role:
        problems.append(
            f"there is no role {p.replication_user} with LOGIN and REPLICATION: CREATE ROLE "
            f"{p.replication_user} LOGIN REPLICATION (postgresql.replication_user)"
        )
    if level == "minimal":
        problems.append("wal_level is minimal: set it to replica and restart PostgreSQL")
    if int(str(senders)) < len(c.members):
        problems.append(
            f"max_wal_senders is {senders}, {len(c.members)} are needed: raise it and restart PostgreSQL"
        )
    if not rewindable:
        remarks.append(
            "wal_log_hints is off and there are no data checksums: until the next restart of PostgreSQL, which turns "
            "it on, an old primary comes back by a copy, not by pg_rewind"
        )
    if hot != "on":
        remarks.append(f"hot_standby is {hot}: the next start of PostgreSQL turns it on")
    if p.listen_addresses is not None and listens != p.listen_addresses:
        remarks.append(
            f"listen_addresses becomes '{p.listen_addresses}' at the next start, it is '{listens}'"
        )
    if names:
        remarks.append(f"synchronous_standby_names is replaced (replication.mode): it is {names}")
    remarks.append("streaming now: " + ("; ".join(sorted(map(str, _list(streams)))) or "nobody"))


def look_at(c: Config, name: str, system_identifier: str) -> tuple[str, str]:
    """Another member, as a standby would reach it: ("", what is wrong) where it answers, else (why it does not, "")."""
    address, p = c.members[name], c.postgresql
    try:
        with psycopg.connect(
            host=address.host, port=address.port, user=p.replication_user, dbname="postgres", replication="true",
            connect_timeout=CONNECT_S, autocommit=True, cursor_factory=psycopg.ClientCursor,
            passfile=p.replication_passfile or "",
        ) as link:  # fmt: skip
            known = link.execute("IDENTIFY_SYSTEM").fetchone()
            hot = link.info.server_version >= 140000
            shown = link.execute("SHOW in_hot_standby" if hot else "SHOW transaction_read_only").fetchone()
    except psycopg.Error as e:
        return (
            f"{name} cannot be reached as {p.replication_user} at {address.host}:{address.port}: {in_a_line(e)}",
            "",
        )
    if known is None or shown is None:
        raise AssertionError("IDENTIFY_SYSTEM and SHOW give one row")
    return "", against_member(name, _text(known[0]), system_identifier, read_only=_text(shown[0]) == "on")


def against_member(name: str, theirs: str, ours: str, *, read_only: bool) -> str:
    """What speaks against another member that has answered; empty: nothing. Pure."""
    if theirs != ours:
        return f"{name} has system identifier {theirs}, this node {ours}: it is another cluster's"
    if not read_only:
        return f"{name} accepts writes, too: TWO PRIMARIES of one cluster; stop the wrong one first"
    return ""


def look_at_members(c: Config, without: tuple[str, ...], found: Findings) -> None:
    """Each other configured member; who is away must be named in `without`. Blocks for CONNECT_S each."""
    for name in c.members:
        if name == c.node.name:
            continue
        away, wrong = look_at(c, name, found.system_identifier)
        if wrong:
            found.problems.append(wrong)
        elif away and name in without:
            found.remarks.append(f"without {name}: {away}")
        elif away:
            found.problems.append(
                f"{away} (start it, correct its pg_hba.conf, or go on with --without {name})"
            )
    found.problems += [f"--without {n}: not another configured member" for n in without if n not in c.members]


def look_at_store(
    c: Config, cluster: Entry | None, members: dict[str, Entry | None], found: Findings
) -> None:
    """What the store holds. Pure. System identifiers are compared only where this PostgreSQL has told its own."""
    me, here = c.node.name, found.system_identifier
    try:
        state = decode_cluster(cluster.value) if cluster is not None else None
        known: dict[str, Member | None] = {
            n: decode_member(e.value) if e is not None else None for n, e in members.items()
        }
    except Unreadable as e:
        found.problems.append(f"the store holds a record that is not of this version of Harmony: {e}")
        return
    if state is not None:
        found.problems += _against(state, me, found.system_identifier)
    for name, m in known.items():
        if name != me and m is None:
            found.remarks.append(
                f"Harmony has not been started on {name} yet: start it there first, its PostgreSQL runs on; with "
                "replication.mode quorum the adoption waits for it"
            )
        if here and name != me and m is not None and m.system_identifier not in {None, here}:
            found.problems.append(
                f"{name} reports system identifier {m.system_identifier}: another cluster's"
            )


def _against(state: ClusterState, me: str, system_identifier: str) -> list[str]:
    if system_identifier and state.system_identifier != system_identifier:
        theirs = f"the store's cluster {state.cluster_id} has system identifier {state.system_identifier}"
        return [f"{theirs}, this PostgreSQL {system_identifier}: use another cluster.id"]
    if state.adopting and state.primary == me:
        return []  # begun before, and taken up
    leads = f"{state.primary} leads it" if state.primary is not None else "its place is vacant"
    begun = " (an adoption begun there)" if state.adopting else ""
    return [
        f"the store has this cluster already, {leads} in term {state.term}{begun}: there is nothing to adopt"
    ]


def _text(value: object) -> str:
    """A WAL sender names no encoding."""
    return value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
