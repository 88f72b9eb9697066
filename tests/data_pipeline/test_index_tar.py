"""The tar reader against Python's own, on what writers produce and on what breaks."""

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import InputError
from data_pipeline.index import tar as index_tar
from data_pipeline.index.tar import Member, group_samples
from data_pipeline.storage import ReadAhead, Shard, Storage

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def scan_tar(path: Path, block: int = 8 << 20) -> list[Member]:
    shard = Shard(str(path))
    reader = ReadAhead(Storage(), shard, path.stat().st_size, block)
    return list(index_tar.scan_tar(reader))


def with_checksum(header: bytes | bytearray, **fields: tuple[int, bytes]) -> bytes:
    """The header with some fields overwritten (at, bytes), and a checksum that fits."""
    changed = bytearray(header)
    for at, value in fields.values():
        changed[at : at + len(value)] = value
    changed[148:156] = b" " * 8
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


def make_tar(
    path: Path, files: list[tuple[str, bytes]], kind: str = "pax", mtime: float = 0.5
) -> Path:
    with tarfile.open(path, "w", format=FORMATS[kind]) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            tar.addfile(info, io.BytesIO(data))
    return path


segment = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/"), min_size=1
)
names = st.lists(segment.map(lambda s: s * 7), min_size=1, max_size=5).map("/".join)


@settings(max_examples=60)
@given(
    files=st.lists(st.tuples(names, st.binary(max_size=1100)), max_size=6),
    kind=st.sampled_from(["gnu", "pax"]),
    block=st.integers(1, 3000),
)
def test_agrees_with_tarfile(
    files: list[tuple[str, bytes]],
    kind: str,
    block: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = make_tar(tmp_path_factory.getbasetemp() / "some.tar", files, kind)
    with tarfile.open(path) as tar:
        expected = [Member(m.name, m.offset_data, m.size, True) for m in tar if not m.isdir()]
    members = scan_tar(path)
    assert members == expected
    assert scan_tar(path, block) == members
    reader = ReadAhead(Storage(), Shard(str(path)), path.stat().st_size, block)
    assert [reader.read(m.offset, m.size) for m in members] == [data for _, data in files]


@pytest.mark.parametrize("kind", FORMATS)
def test_long_names(kind: str, tmp_path: Path) -> None:
    name = "folder/" * 15 + "k" * 60 + ".json"  # 172 characters: ustar splits it in two fields
    path = make_tar(tmp_path / "a.tar", [(name, b"1"), ("after.json", b"22")], kind)
    assert [(m.name, m.size) for m in scan_tar(path)] == [(name, 1), ("after.json", 2)]


def test_a_volume_label_is_no_member(tmp_path: Path) -> None:
    label = tarfile.TarInfo("backup.1")
    label.type = b"V"
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(label)
        tar.addfile(tarfile.TarInfo("a.json"))
    assert [member.name for member in scan_tar(tmp_path / "a.tar")] == ["a.json"]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    with tarfile.open(
        tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1"
    ) as tar:
        tar.addfile(tarfile.TarInfo("é.json"))
    (member,) = scan_tar(tmp_path / "a.tar")
    assert member.name == "\\xe9.json"


def test_sizes_in_base_256_and_pax(tmp_path: Path) -> None:
    """What writers use from 8 GiB on, here on small members: only the fields are large."""
    info = tarfile.TarInfo("a.json")
    info.size = 5
    size = b"\x80" + (5).to_bytes(11, "big")
    header = with_checksum(info.tobuf(tarfile.USTAR_FORMAT), size=(124, size))
    data = b"hello".ljust(512, b"\0")
    pax = tarfile.TarInfo("b.json")
    pax.pax_headers = {"size": "5"}
    pax.size = 0  # as for a size that the field cannot hold
    entries = header + data + pax.tobuf(tarfile.PAX_FORMAT) + data
    (tmp_path / "a.tar").write_bytes(entries + bytes(1024))
    assert [(m.name, m.size) for m in scan_tar(tmp_path / "a.tar")] == [
        ("a.json", 5),
        ("b.json", 5),
    ]


def test_links_devices_and_folders(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in [
            ("folder.x", tarfile.DIRTYPE),
            ("a.json", tarfile.SYMTYPE),
            ("b.json", tarfile.LNKTYPE),
            ("c.json", tarfile.FIFOTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            info.size = 700  # of the file linked to, as some writers have it; no data follows
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("d.json"))
    members = scan_tar(tmp_path / "a.tar")
    assert [(m.name, m.regular) for m in members] == [
        ("a.json", False),
        ("b.json", False),
        ("c.json", False),
        ("d.json", True),
    ]


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = make_tar(tmp_path / "a.tar", [("a.json", b"x" * 700), ("b.0.png", b"y")]).read_bytes()
    last = next(k for k in range(len(whole), 0, -1) if whole[k - 1])  # end of the last data
    end_marker = -(-last // 512) * 512
    for size in [*range(1, end_marker + 512, 97), end_marker, end_marker + 511]:
        (tmp_path / "a.tar").write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"a\.tar (is truncated|is not)"):
            scan_tar(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(whole[: end_marker + 512])  # one zero block is an end
    assert len(scan_tar(tmp_path / "a.tar")) == 2


@given(position=st.integers(0, 511), value=st.integers(0, 255))
def test_damaged_headers_never_hang_or_escape(
    position: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = make_tar(
        tmp_path_factory.getbasetemp() / "damaged.tar", [("a.json", b"x" * 700), ("b.json", b"")]
    )
    data = bytearray(path.read_bytes())
    # The header behind the PAX entry; its checksum fits, so that only the contents are wrong.
    data[1024:1536] = with_checksum(data[1024:1536], byte=(position, bytes([value])))
    path.write_bytes(data)
    try:
        assert len(scan_tar(path)) <= 3
    except InputError as error:
        assert "damaged.tar" in str(error)


def test_what_is_no_tar(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    whole = make_tar(path, [("a.json", b"x")], "gnu").read_bytes()
    sparse = with_checksum(whole[:512], kind=(156, b"S"))
    negative = with_checksum(whole[:512], size=(124, b"-0000000001\0"))
    huge = with_checksum(whole[:512], size=(124, b"\x80" + b"\xff" * 11))
    bad_pax = make_tar(path, [("é" * 60, b"x")], "pax").read_bytes().replace(b" path=", b"xpath=")
    for data, reason in [
        (b"", "is empty"),
        (b"\x1f\x8b" * 400, "is not an uncompressed tar file but a packed one"),
        (b"\x1f\x8b" * 40, "is not an uncompressed tar file but a packed one"),
        (b"version https://git-lfs.github.com/spec/v1", "pointer of Git LFS.*git lfs pull"),
        (whole[:1024] + b"junk" * 128, "is damaged: no valid tar header"),
        (whole + whole, "goes on after its end marker"),
        (sparse + bytes(1024), "sparse"),
        (negative + bytes(1024), "is not an uncompressed tar file"),
        (huge + bytes(1024), "is truncated: the entry at byte 0 reaches to byte"),
        (b"b" + whole[1:], "is not an uncompressed tar file"),  # the checksum does not fit
        (bad_pax, "bad PAX record"),
    ]:
        path.write_bytes(data)
        with pytest.raises(InputError, match=reason) as caught:
            scan_tar(path)
        assert "a.tar" in str(caught.value)


def test_groups_by_key() -> None:
    def member(name: str, regular: bool = True) -> Member:
        return Member(name, 0, 0, regular)

    yielded = group_samples(
        iter(
            [
                member("a/k.0.png"),
                member("k.json"),
                member("a/k.json"),  # not beside its image, and not the k of the other folder
                member("./dots.in.name.json"),
                member("README"),
                member("._k.json"),
                member("twice.json"),
                member("twice.json"),
                member("../up.json"),
                member("/root.json"),
                member("a..b/fine.json"),
                member("link.json", regular=False),
            ]
        )
    )
    order = []
    groups = {}
    for key, group in yielded:
        order.append((key, len(group.members)))
        groups[key] = group
    assert order[:3] == [("a/k", 1), ("k", 1), ("./dots", 1)]  # as the next key begins
    assert order[-1] == ("a/k", 2) and [key for key, _ in order].count("a/k") == 2
    assert {key: list(group.members) for key, group in groups.items()} == {
        "a/k": ["0.png", "json"],
        "k": ["json"],
        "./dots": ["in.name.json"],
        "twice": ["json"],
        "../up": ["json"],
        "/root": ["json"],
        "a..b/fine": ["json"],
        "link": ["json"],
    }
    problems = {key: group.problem for key, group in groups.items() if group.problem}
    assert problems.keys() == {"twice", "../up", "/root", "link"}
    assert "two members" in problems["twice"] and "link" in problems["link"]
