"""The README's table of differences is what the scripts say, and the scripts' language refuses what it doesn't know."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.packets.script import ScriptError, read, read_all, read_step
from tools.packets_vs_pasta import SCRIPTS, judge, table

README = Path(__file__).resolve().parents[3] / "README.md"
CASES = read_all(SCRIPTS)


def test_the_readme_has_the_table() -> None:
    section = README.read_text().split("\n## Where we differ from pasta\n")[1].split("\n## ")[0]
    told = "\n".join(line for line in section.splitlines() if line.startswith("|"))
    assert told == table(CASES), "run tools/packets-vs-pasta --table"


def test_names_are_unique_and_there_are_enough() -> None:
    names = [case.name for case in CASES]
    assert sorted(set(names)) == sorted(names)
    assert len(names) >= 60


@pytest.mark.parametrize(
    ("pasta", "wrong", "said"),
    [
        ("same", {}, ""),
        ("same", {"ipv4": "it"}, "differs, which its script doesn't say"),
        ("differs: so", {"ipv6": "it"}, ""),
        ("differs: so", {}, "is the same, though its script says that it differs"),
    ],
)
def test_judge(pasta: str, wrong: dict[str, str], said: str) -> None:
    case = CASES[0].__class__("file", "name", "why", 1, pasta=pasta)
    assert judge(case, wrong) == said


@pytest.mark.parametrize(
    "text",
    [
        "    > S 1000\n",
        "case without-a-reason\n    > S 1000\n",
        "# Why.\ncase does-nothing\n",
        "# Why.\ncase twice\n    > S 1\n# Why.\ncase twice\n    > S 1\n",
        "# Why.\ncase whose\n    only: ipv5\n    > S 1\n",
        "# Why.\ncase how\n    pasta: perhaps\n    > S 1\n",
    ],
)
def test_scripts_that_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.pkt"
    path.write_text(text)
    with pytest.raises(ScriptError):
        read(path)


def test_a_step() -> None:
    line = '< P. 1 ack=1001 win>0 len<=536|1220 !mss sackok "a b"'
    four, six = (read_step("file", 1, line, family) for family in ("ipv4", "ipv6"))
    assert (four.verb, four.words, four.data) == ("<", ("P.", "1", "sackok"), b"a b")
    assert [(key.name, key.relation, key.value) for key in four.keys] == [
        ("ack", "=", "1001"),
        ("win", ">", "0"),
        ("len", "<=", "536"),
        ("mss", "!", ""),
    ]
    assert six.number("len") == 1220
    length = four.keys[2]
    assert [length.holds(value) for value in (536, 537, None)] == [True, False, False]
    assert [four.keys[3].holds(value) for value in (None, 1460)] == [True, False]
