"""The command line's rules and those of adoption's look, each broken on purpose (bench/mutate.py)."""

from __future__ import annotations

from bench.mutants.rule import Rule

CLI, ADOPTION = "harmony/cli", "harmony/adoption.py"
ADOPT, COMMANDS, CONTROL, STORE, SHARED, SWITCHOVER = (
    f"tests/cli/test_{name}.py" for name in ("adopt", "commands", "control", "store", "shared", "switchover")
)

RULES: list[Rule] = [
    # what is looked at before a primary is adopted
    ("adopt: not a standby", ADOPTION, "    if recovering:\n", "    if False:\n", ADOPT),
    ("adopt: the data directory that is configured", ADOPTION, "if Path(str(data)).resolve() != Path(p.data_dir).resolve():", "if False:", ADOPT),
    ("adopt: no replication without its WAL", ADOPTION, 'if level == "minimal":', "if False:", ADOPT),
    ("adopt: a place for each standby", ADOPTION, "if int(str(senders)) < len(c.members):", "if False:", ADOPT),
    ("adopt: a role for the standbys", ADOPTION, "    if not role:\n", "    if False:\n", ADOPT),
    ("adopt: a role that sees", ADOPTION, "    if not monitor:\n", "    if False:\n", ADOPT),
    ("adopt: two primaries", ADOPTION, "    if not read_only:\n", "    if False:\n", ADOPT),
    ("adopt: another member's cluster", ADOPTION, "    if theirs != ours:\n", "    if False:\n", ADOPT),
    ("adopt: who is away must be named", ADOPTION, "elif away and name in without:", "elif away:", ADOPT),
    ("adopt: a stranger is named in vain", ADOPTION, "for n in without if n not in c.members]", "for n in ()]", ADOPT),
    ("adopt: what the store's members report", ADOPTION, "m.system_identifier not in {None, here}:", "False:", ADOPT),
    ("adopt: what is not known here accuses nobody", ADOPTION, "if here and name != me and m is not None", "if name != me and m is not None", ADOPT),
    ("adopt: the store's cluster is this one", ADOPTION, "if system_identifier and state.system_identifier != system_identifier:", "if False:", ADOPT),
    ("adopt: taken up only by who began it", ADOPTION, "if state.adopting and state.primary == me:", "if state.adopting:", ADOPT),
    ("adopt: what is led is not adopted", ADOPTION, "if state.adopting and state.primary == me:", "if state.primary == me:", ADOPT),
    ("adopt: asked as the agent asks", ADOPTION, "    os.seteuid(pwd.getpwnam(c.agent.user).pw_uid)\n", "", ADOPT),
    ("adopt: root again afterwards", ADOPTION, "        os.seteuid(0)\n", "        pass\n", f"{ADOPT} -k asked_as_the_agent"),
    ("adopt: nothing against it", f"{CLI}/adopt.py", "    if found.problems:\n", "    if False:\n", f"{ADOPT} -k permitted"),
    ("adopt: the fencer's problems count", f"{CLI}/adopt.py", "    found.problems += judged.problems\n", "", f"{ADOPT} -k permit"),
    ("adopt: a dry run permits nothing", f"{CLI}/adopt.py", "    if dry_run:\n", "    if False:\n", f"{ADOPT} -k permit"),
    ("adopt: it asks first", f"{CLI}/adopt.py", "take this PostgreSQL over?\", yes=yes):", "take this PostgreSQL over?\", yes=True):", f"{ADOPT} -k permit"),
    ("adopt: a permit that the fencer refuses is none", f"{CLI}/adopt.py", "    if judged.problems:\n", "    if False:\n", f"{ADOPT} -k permit"),
    ("adopt: only root permits", f"{CLI}/adopt.py", "if os.geteuid() != 0 and config.postgresql.user is not None:", "if False:", f"{ADOPT} -k only_root"),
    ("adopt: done when it is led", f"{CLI}/adopt.py", "c.status in WRITABLE_STATES and not c.adopting else", "c.status in WRITABLE_STATES else", f"{ADOPT} -k progress"),
    ("adopt: somebody else leads", f"{CLI}/adopt.py", "    if c.primary != me:\n", "    if False:\n", f"{ADOPT} -k progress"),
    # fence and unfence
    ("fence: force is at once", f"{CLI}/fence.py", "clean=not force)", "clean=True)", f"{COMMANDS} -k force_needs"),
    ("fence: without force it asks", f"{CLI}/fence.py", "    if not force:\n", "    if False:\n", f"{COMMANDS} -k 'asks_before or nobody_can'"),
    ("fence: nobody could take over", f"{CLI}/fence.py", "    if not can:\n", "    if False:\n", f"{COMMANDS} -k nobody_can"),
    ("fence: proven with its latch only", f"{CLI}/fence.py", " and s.latch is not None", "", f"{COMMANDS} -k fence"),
    ("fence: proven, not only down", f"{CLI}/fence.py", "proven = s.fence_proven and ", "proven = ", f"{COMMANDS} -k fence"),
    ("fence: an older order is not its outcome", f"{CLI}/fence.py", "if record is None or record.generation < generation:", "if record is None:", f"{COMMANDS} -k order_of_before"),
    ("fence: what still runs is no outcome", f"{CLI}/fence.py", 'if record.generation == generation and record.state == "running":', "if False:", f"{COMMANDS} -k fence"),
    ("fence: a fencer that refuses is bypassed", f"{CLI}/fence.py", '            if reply.error == "not_permitted":\n                say(NOT_PERMITTED, err=True)\n                sys.exit(1)\n', "            sys.exit(1)\n", f"{COMMANDS} -k bypassed"),
    ("fence: the one-shot latches", f"{CLI}/fence.py", '    argv += ["--latch", who()]\n', "", f"{COMMANDS} -k one_shot_latches"),
    ("fence: the one-shot's proof", f"{CLI}/fence.py", "sys.exit(0 if code == 0 else 1)", "sys.exit(0)", f"{COMMANDS} -k one_shot"),
    ("fence: as long as a clean one may take", f"{CLI}/fence.py", "known.lease_s + known.fence_timeout_s + PATIENCE_S", "known.fence_timeout_s", f"{COMMANDS} -k waited_for"),
    ("unfence: a refusal is none", f"{CLI}/fence.py", "    if isinstance(reply, protocol.Done):\n", "    if isinstance(reply, protocol.Done | protocol.Refusal):\n", f"{COMMANDS} -k unfence"),
    ("cli: a file that was named, and no other", f"{CLI}/where.py", 'if config or os.environ.get("HARMONY_CONFIG"):', "if False:", f"{COMMANDS} -k cannot_be_used"),
    ("cli: a broken default file still says where", f"{CLI}/where.py", 'return stated if isinstance(stated, str) and stated.startswith("/") else DEFAULT_RUN_DIR', "return DEFAULT_RUN_DIR", f"{COMMANDS} -k still_says"),
    ("cli: a host without names fences", f"{CLI}/where.py", "except (KeyError, OSError):", "except ZeroDivisionError:", f"{COMMANDS} -k without_names"),
    ("cli: who used sudo", f"{CLI}/where.py", 'os.environ.get("SUDO_USER") or getpass.getuser()', "getpass.getuser()", f"{COMMANDS} -k used_sudo"),
    ("cli: sudo is said first", f"{CLI}/where.py", "if isinstance(cause, PermissionError):", "if False:", f"{COMMANDS} -k sudo_first"),
    ("cli: nobody reads, and it goes on", f"{CLI}/terminal.py", "    except OSError:\n", "    except ZeroDivisionError:\n", f"{COMMANDS} -k nobody_who_reads"),
    ("cli: no terminal says yes", f"{CLI}/terminal.py", "yes or (sys.stdin.isatty() and click.confirm(question))", "yes or not sys.stdin.isatty() or click.confirm(question)", f"{SHARED} -k only_an_option"),
    ("cli: 64 is wrong usage", f"{CLI}/main.py", "code = os.EX_USAGE", "code = 2", f"{SHARED} -k wrong_usage"),
    ("cli: 70 is a fault of ours", f"{CLI}/main.py", "    traceback.print_exception(e)\n    return os.EX_SOFTWARE", "    traceback.print_exception(e)\n    return 1", f"{SHARED} -k fault_of_ours"),
    ("cli: nobody reads, and no traceback", f"{CLI}/main.py", "raise _Unread from e", "raise", f"{SHARED} -k nobody_reads"),
    # the record `control`, and switchover
    ("control: by compare-and-set", f"{CLI}/control.py", "encode(wanted), revision, timeout_s=CALL_S)", "encode(wanted), (await _read(store))[2], timeout_s=CALL_S)", CONTROL),
    ("control: a lost answer is looked up", f"{CLI}/control.py", "if attempt and control.attempt == attempt:", "if False:", f"{CONTROL} -k lost_answer"),
    ("control: each attempt its own", f"{CLI}/control.py", "attempt = uuid.uuid4().hex\n", 'attempt = "a"\n', CONTROL),
    ("control: no bucket is made", f"{CLI}/control.py", "may_create=False,", "may_create=True,", f"{CONTROL} -k real_store"),
    ("control: the configured credentials", f"{CLI}/control.py", "credentials_file=s.credentials_file,", "credentials_file=None,", f"{CONTROL} -k credentials"),
    ("control: results stand alone", f"{CLI}/control.py", "logging.DEBUG if verbose else logging.CRITICAL", "logging.DEBUG", f"{CONTROL} -k one_line"),
    ("acknowledge: it asks first", f"{CLI}/acknowledge.py", "confirmed(question, yes=yes)", "confirmed(question, yes=True)", f"{CONTROL} -k asks_first"),
    ("acknowledge: what was acknowledged stays so", f"{CLI}/acknowledge.py", "max(control.acknowledged, cluster.term)", "cluster.term", f"{CONTROL} -k stays_so"),
    ("switchover: it asks first", f"{CLI}/switchover.py", 'to {chosen}?", yes=yes):', 'to {chosen}?", yes=True):', f"{CONTROL} -k switchover_asks"),
    ("switchover: a dry run asks for nothing", f"{CLI}/switchover.py", "        if dry_run:\n", "        if False:\n", f"{CONTROL} -k switchover_asks"),
    ("switchover: of what was seen", f"{CLI}/switchover.py", "if (now.term, now.primary) != (seen.term, seen.primary):", "if now.term != seen.term:", SWITCHOVER),
    ("switchover: whose agent is gone hands nothing over", f"{CLI}/switchover.py", "if primary not in self.members:", "if False:", SWITCHOVER),
    ("switchover: who lags does not take over", f"{CLI}/switchover.py", " or behind_by(self.cluster, m, name, self.maximum_lag_bytes)", "", SWITCHOVER),
    ("switchover: alive by the store's stamps", f"{CLI}/switchover.py", "and e.created_ns >= alive_ns", "", SWITCHOVER),
    ("switchover: another winner is no success", f"{CLI}/switchover.py", "    if c.primary == to:\n", "    if True:\n", SWITCHOVER),
    ("switchover: a refusal is its own request's", f"{CLI}/switchover.py", "c.refused is not None and c.refused[0] == request:", "c.refused is not None:", SWITCHOVER),
    # store accept
    ("accept: data of another cluster moves by its name", f"{CLI}/store.py", "    if leave != was_in:\n", "    if False:\n", f"{STORE} -k 'moves_only or leaves_none'"),
    ("accept: it asks first", f"{CLI}/store.py", "confirmed(question, yes=yes)", "confirmed(question, yes=True)", f"{STORE} -k before_the_question"),
    ("accept: the risks are said", f"{CLI}/store.py", "    click.echo(RISKS)\n", "", f"{STORE} -k before_the_question"),
    ("accept: the risk of founding is said", f"{CLI}/store.py", "        click.echo(FOUND_RISK)\n", "        pass\n", STORE),
    ("accept: founds only where it is asked for", f"{CLI}/store.py", "AcceptRequest(found, who", "AcceptRequest(True, who", STORE),
    ("accept: a refusal is none", f"{CLI}/store.py", "    if not reply.accepted:\n", "    if False:\n", STORE),
    ("store show: 1 is distrusted", f"{CLI}/store.py", "sys.exit(DISTRUSTED if s.myself.distrust else TRUSTED)", "sys.exit(TRUSTED)", f"{STORE} -k exit_code"),
    # config
    ("config check: --host looks at the host", f"{CLI}/configuration.py", "        if host:\n", "        if False:\n", f"{COMMANDS} -k config_commands"),
    ("config check: 78 where it cannot be used", f"{CLI}/configuration.py", "    sys.exit(EXIT_CONFIG)\n", "", f"{COMMANDS} -k config_commands"),
    ("config check: warnings are said", f"{CLI}/configuration.py", "    click.echo(_timing_text(loaded.timing))\n    for warning in warnings:\n", "    click.echo(_timing_text(loaded.timing))\n    for warning in ():\n", "tests/config/test_words.py -k near_miss"),
]  # fmt: skip
