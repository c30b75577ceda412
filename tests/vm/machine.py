"""A virtual machine with a watchdog: Debian's kernel, an initramfs with Python in it, QEMU's emulation.

Needs qemu-system-x86_64 (apt-get install --no-install-recommends qemu-system-x86), apt-get and dpkg.
The kernel is downloaded and unpacked, never installed, and kept in ~/.cache/harmony-vm.
"""

from __future__ import annotations

import json
import lzma
import os
import re
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

TOP = Path(__file__).parents[2]
CACHE = Path.home() / ".cache" / "harmony-vm"
GUEST = TOP / "tests/vm/guest.py"
PACKAGE = [TOP / "fencer/harmony_fencer" / name for name in ("__init__.py", "watchdog.py")]
# What the guest's Python loads besides: the codecs of a bare start.
EXTRA = {"encodings.ascii", "encodings.latin_1", "encodings.utf_8"}
PROBE = r"print(*(f for m in list(sys.modules.values()) if (f := getattr(m, '__file__', None))), sep='\n')"


@dataclass(frozen=True)
class Seen:
    """One thing that was seen from outside, `at_s` seconds after the machine was started."""

    at_s: float
    what: str


def run(argv: list[str], cwd: Path | None = None) -> str:
    return subprocess.run(argv, cwd=cwd, check=True, capture_output=True, text=True, timeout=300).stdout


def kernel() -> Path:
    """The folder with Debian's current kernel unpacked: vmlinux and lib/modules."""
    found = re.search(r"Depends: (linux-image-\S+)", run(["apt-cache", "depends", "linux-image-amd64"]))
    assert found, "apt knows no linux-image-amd64: apt-get update"
    folder = CACHE / found[1]
    if not (folder / "vmlinux").exists():
        folder.mkdir(parents=True, exist_ok=True)
        run(["apt-get", "download", found[1]], cwd=folder)
        (package,) = folder.glob("*.deb")
        run(["dpkg", "-x", str(package), str(folder)])
        package.unlink()
        packed = next((folder / "boot").glob("vmlinuz-*")).read_bytes()
        # Unpacked here: under emulation the kernel needs far longer for it.
        raw = lzma.LZMADecompressor().decompress(packed[packed.index(b"\xfd7zXZ\0") :])
        (folder / "vmlinux.new").write_bytes(raw)
        (folder / "vmlinux.new").rename(folder / "vmlinux")
    return folder


def python_files() -> dict[str, Path]:
    """This Python with what the guest imports, by its absolute path."""
    executable = Path(sys.executable).resolve()
    lines = "\n".join(file.read_text() for file in [GUEST, *PACKAGE])
    wanted = set(re.findall(r"^(?:import|from) (\S+)", lines, re.MULTILINE)) | EXTRA | {"sys"}
    imports = "".join(f"import {name}\n" for name in sorted(wanted) if not name.startswith("harmony"))
    files = {Path(name) for name in run([str(executable), "-I", "-S", "-c", imports + PROBE]).split()}
    files.add(executable)
    for binary in [f for f in files if f.read_bytes()[:4] == b"\x7fELF"]:
        files |= {Path(name) for name in re.findall(r"(/\S+) \(0x", run(["ldd", str(binary)]))}
    return {str(file): file for file in files}


def cpio(files: dict[str, bytes | None]) -> bytes:
    """A cpio archive, format newc; None is a folder. (Documentation/driver-api/early-userspace/buffer-format.rst)"""
    out = bytearray()
    for number, (name, data) in enumerate([*files.items(), ("TRAILER!!!", b"")], 1):
        raw, body = name.encode() + b"\0", data or b""
        mode = 0o040755 if data is None else 0o100755
        fields = (number, mode, 0, 0, 1, 0, len(body), 0, 0, 0, 0, len(raw), 0)
        out += b"070701" + b"".join(b"%08x" % field for field in fields) + raw
        out += bytes(-len(out) % 4) + body
        out += bytes(-len(out) % 4)
    return bytes(out)


def initramfs(kernel_folder: Path) -> bytes:
    executable = Path(sys.executable).resolve()
    contents = {name: path.read_bytes() for name, path in python_files().items()}
    contents["/init"] = b"#!%s -ISB\n" % os.fsencode(executable) + GUEST.read_bytes()
    contents |= {f"/harmony/harmony_fencer/{file.name}": file.read_bytes() for file in PACKAGE}
    for name in ("watchdog", "i6300esb"):
        (module,) = kernel_folder.rglob(f"drivers/watchdog/{name}.ko")
        contents[f"/modules/{name}.ko"] = module.read_bytes()
    folders = {str(parent) for name in contents for parent in Path(name).parents} - {"/"}
    # Python looks for this folder to know where it lives.
    folders.add(str(Path(os.__file__).parent / "lib-dynload"))
    every: dict[str, bytes | None] = {name.lstrip("/"): None for name in sorted(folders)}
    return cpio(every | {name.lstrip("/"): data for name, data in contents.items()})


class Machine:
    """One virtual machine; `watch()` notes what its serial port and QEMU's monitor say."""

    def __init__(self, kernel_image: Path, initrd: Path, mode: str) -> None:
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{folder}/qmp")
            listener.listen(1)
            listener.settimeout(60)
            # rdrand: without a source of randomness Python does not start.
            argv = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-machine", "pc,accel=tcg"]
            argv += ["-cpu", "qemu64,+rdrand", "-m", "512", "-display", "none"]
            argv += ["-device", "i6300esb", "-action", "watchdog=reset"]
            argv += ["-serial", "stdio", "-qmp", f"unix:{folder}/qmp"]
            argv += ["-kernel", str(kernel_image), "-initrd", str(initrd)]
            argv += ["-append", f"console=ttyS0 quiet random.trust_cpu=on harmony={mode}"]
            self._began = time.monotonic()
            self._qemu = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            try:
                self._monitor = listener.accept()[0]
            except TimeoutError as e:
                self._qemu.kill()
                raise AssertionError(f"QEMU did not start: {self._qemu.communicate()[0]!r}") from e
        self._monitor.sendall(b'{"execute": "qmp_capabilities"}\n')
        self._seen: list[Seen] = []

    def watch(self, until: str, times: int, seconds: float = 180) -> list[Seen]:
        """Everything seen until `until` (a part of a line) was seen so many times, or the machine ended.

        Raises AssertionError after `seconds`, or when the guest's kernel panics.
        """
        assert self._qemu.stdout is not None
        serial, monitor = self._qemu.stdout.fileno(), self._monitor.fileno()
        rest = {serial: b"", monitor: b""}
        with selectors.DefaultSelector() as selector:
            for fd in rest:
                selector.register(fd, selectors.EVENT_READ)
            while rest and sum(until in s.what for s in self._seen) < times:
                left = self._began + seconds - time.monotonic()
                assert left > 0, f"no {until!r} within {seconds} s"
                for key, _ in selector.select(left):
                    chunk = os.read(key.fd, 65536)
                    at_s = time.monotonic() - self._began
                    *lines, rest[key.fd] = (rest[key.fd] + chunk).split(b"\n")
                    for line in lines:
                        self._note(at_s, line, from_monitor=key.fd == monitor)
                    if not chunk:
                        selector.unregister(key.fd)
                        del rest[key.fd]
                assert not any("Kernel panic" in s.what for s in self._seen)
        return self._seen

    def _note(self, at_s: float, line: bytes, *, from_monitor: bool) -> None:
        text = line.decode(errors="replace").strip()
        if from_monitor:
            message = json.loads(text)
            text = f"QEMU: {message['event']} {message.get('data', '')}" if "event" in message else ""
        if text:
            self._seen.append(Seen(at_s, text))
            print(f"{at_s:7.2f} s  {text}", flush=True)

    def close(self) -> None:
        self._monitor.close()
        self._qemu.kill()
        self._qemu.communicate()
