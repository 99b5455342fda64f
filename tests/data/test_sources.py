"""Which documents a dataset has, which split each is in, and what is said when it cannot be had."""

import gzip
import hashlib
import os

import numpy as np
import pytest
import tensorflow_datasets as tfds

from ultramem_jax import DataConfig, UserError
from ultramem_jax.data import sources
from ultramem_jax.data.sources import SPLITS, open_source, split_of


def documents(config: DataConfig) -> dict[str, list[tuple[str, bytes]]]:
    source = open_source(config)
    return {split: [(d.name, d.data) for d in source.documents(split)] for split in SPLITS}


def write(root, files: dict[str, bytes]):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def test_split_is_the_hash_of_the_path_mod_100():
    # The first 8 bytes of each sha256, big-endian, mod 100: below 90 trains, below 95 validates.
    for name in ("a.py", "b/c.py", "ünicode.txt"):
        percent = int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) % 100
        assert split_of(name) == ("train" if percent < 90 else "validation" if percent < 95 else "test")
    counts = {split: sum(split_of(f"{i}.py") == split for i in range(4000)) for split in SPLITS}
    # Standard deviations 19 and 14; five of them.
    assert abs(counts["train"] - 3600) < 95
    assert abs(counts["validation"] - 200) < 70 and abs(counts["test"] - 200) < 70


def test_stdlib_is_disjoint_stable_and_without_tests():
    first, second = documents(DataConfig()), documents(DataConfig())
    assert first == second
    names = [name for split in SPLITS for name, _ in first[split]]
    assert len(names) == len(set(names)) > 300
    assert "json/decoder.py" in names
    assert not any({"test", "site-packages", "__pycache__"} & set(name.split("/")) for name in names)
    assert all(split_of(name) == split for split in SPLITS for name, _ in first[split])


def test_folder_takes_text_and_leaves_the_rest(tmp_path):
    files = {
        "a.txt": b"plain",
        "q.txt": b"validates",
        "deep/er/b.md": b"nested",
        "c.gz": gzip.compress(b"packed"),
        "latin.txt": b"caf\xe9",
        "picture.png": b"\x89PNG\x00\x01",
        "packed_picture.gz": gzip.compress(b"\x89PNG\x00\x01"),
        "empty.txt": b"",
        ".hidden": b"no",
        ".git/config": b"no",
    }
    write(tmp_path, files)
    found = documents(DataConfig(dataset="text", path=str(tmp_path)))
    assert {name: data for split in SPLITS for name, data in found[split]} == {
        "a.txt": b"plain",
        "q.txt": b"validates",
        "deep/er/b.md": b"nested",
        "c.gz": b"packed",
        "latin.txt": b"caf\xe9",
    }


def test_files_of_a_folder_stay_in_their_splits_when_one_is_added(tmp_path):
    config = DataConfig(dataset="text", path=str(write(tmp_path, {f"{i}.txt": b"x" for i in range(60)})))
    before = documents(config)
    write(tmp_path, {"new.txt": b"x"})
    after = documents(config)
    for split in SPLITS:
        assert [d for d in after[split] if d[0] != "new.txt"] == before[split]


@pytest.mark.parametrize("name", ["all.txt", "all.txt.gz"])
def test_a_file_is_cut_in_order(tmp_path, name):
    data = bytes(range(1, 201))
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    found = documents(DataConfig(dataset="text", path=str(tmp_path / name)))
    assert found == {
        "train": [(name, data[:180])],
        "validation": [(name, data[180:190])],
        "test": [(name, data[190:])],
    }


def test_key_follows_content_not_time_stamps(tmp_path):
    config = DataConfig(dataset="text", path=str(write(tmp_path, {"a": b"one", "q.txt": b"two"})))
    key = open_source(config).survey().key
    (tmp_path / "a").touch()
    assert open_source(config).survey().key == key
    (tmp_path / "a").write_bytes(b"onf")
    changed = open_source(config).survey()
    assert changed.key != key and changed.num_bytes == 6


def test_corpus_hash_tells_where_one_part_ends():
    def digest(*documents):
        corpus_hash = sources.CorpusHash()
        for split, name, data in documents:
            corpus_hash.update(split, sources.Document(name, data))
        return corpus_hash.hexdigest()

    assert (
        len({digest(("train", "a", b"bc")), digest(("train", "ab", b"c")), digest(("test", "a", b"bc"))}) == 3
    )
    # By hand: 8-byte little-endian lengths 5, 1, 2 before "train", "a", "bc".
    stream = b"\5" + bytes(7) + b"train" + b"\1" + bytes(7) + b"a" + b"\2" + bytes(7) + b"bc"
    assert digest(("train", "a", b"bc")) == hashlib.sha256(stream).hexdigest()


@pytest.mark.parametrize("name", ["enwik8", "enwik8.gz"])
def test_enwik8_is_90_5_5(tmp_path, monkeypatch, name):
    data = bytes(np.random.default_rng(0).integers(0, 256, 1000, np.uint8))
    monkeypatch.setattr(sources, "ENWIK8_BYTES", 1000)
    monkeypatch.setattr(sources, "ENWIK8_SHA256", hashlib.sha256(data).hexdigest())
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    found = documents(DataConfig(dataset="enwik8", path=str(tmp_path / name)))
    assert [found[split] for split in SPLITS] == [
        [("enwik8", data[:900])],
        [("enwik8", data[900:950])],
        [("enwik8", data[950:])],
    ]


def test_enwik8_with_one_byte_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ENWIK8_BYTES", 3)
    (tmp_path / "e").write_bytes(b"abc")
    with pytest.raises(UserError, match=r"data\.path = .*sha256 2b49720e.*this one has sha256 ba7816bf"):
        open_source(DataConfig(dataset="enwik8", path=str(tmp_path / "e")))


ASCII = "the slot of a key\n"
NOT_TEXT = {
    "utf16.txt": (ASCII.encode("utf-16"), "likely UTF-16 or UTF-32: convert it to UTF-8"),
    "le.txt": (ASCII.encode("utf-16-le"), "likely UTF-16"),
    "be.txt": (ASCII.encode("utf-16-be"), "likely UTF-16"),
    "chinese.txt": ("键的槽".encode("utf-16"), "likely UTF-16"),  # no byte is zero
    "utf32.txt": (ASCII.encode("utf-32"), "likely UTF-16 or UTF-32"),
    "big.txt": (b"\0\0\xfe\xff" + ASCII.encode("utf-32-be"), "likely UTF-16 or UTF-32"),
    "utf16.txt.gz": (gzip.compress(ASCII.encode("utf-16")), "likely UTF-16"),
    "packed.txt": (gzip.compress(ASCII.encode()), "compressed: decompress it, or give a gzip file a name"),
    "twice.gz": (gzip.compress(gzip.compress(ASCII.encode())), "compressed: decompress it"),
    "all.tar.gz": (
        gzip.compress(b"a.txt".ljust(257, b"\0") + b"ustar" + bytes(250)),
        "a tar archive: unpack",
    ),
    "picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "binary: it has a zero byte among its first 8,192"),
    "late": (b"text" * 2047 + b"\0" + b"text", "binary"),
    "zero": (b"\0", "binary"),
    "empty.gz": (gzip.compress(b""), "empty"),
}


@pytest.mark.parametrize("name", NOT_TEXT)
def test_a_file_that_is_not_text_is_refused_and_a_folder_leaves_it_out(tmp_path, name):
    data, kind = NOT_TEXT[name]
    write(tmp_path, {name: data, "a.txt": b"trains", "q.txt": b"validates"})
    with pytest.raises(
        UserError, match="must name an existing file or folder of text; this file is "
    ) as error:
        open_source(DataConfig(dataset="text", path=str(tmp_path / name)))
    assert kind in str(error.value) and "\n" not in str(error.value)
    found = documents(DataConfig(dataset="text", path=str(tmp_path)))
    assert {document for split in SPLITS for document, _ in found[split]} == {"a.txt", "q.txt"}


@pytest.mark.parametrize("dataset", ["text", "enwik8"])
@pytest.mark.parametrize(
    "name", ["/dev/zero", "{tmp}/pipe", "{tmp}/link", "{tmp}/link.gz", "a\0b", "a" * 5000]
)
def test_only_regular_files_are_opened(tmp_path, dataset, name):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "link.gz").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"data\.path = .* must name ") as error:
        open_source(DataConfig(dataset=dataset, path=name.format(tmp=tmp_path)))
    assert "\n" not in str(error.value)


def test_a_folder_of_links_and_pipes(tmp_path):
    write(tmp_path, {"text/a.txt": b"trains", "text/q.txt": b"validates", "elsewhere/b.txt": b"linked"})
    folder = tmp_path / "text"
    os.mkfifo(folder / "pipe.txt")
    for link, target in (
        ("loop", "."),
        ("itself", "itself"),
        ("gone", "nowhere"),
        ("zero.txt", "/dev/zero"),
        ("b.txt", "../elsewhere/b.txt"),
        ("elsewhere", "../elsewhere"),
    ):
        (folder / link).symlink_to(target)
    (tmp_path / "link").symlink_to("text")
    found = documents(DataConfig(dataset="text", path=str(tmp_path / "link")))
    assert {name for split in SPLITS for name, _ in found[split]} == {"a.txt", "q.txt", "b.txt"}


def test_a_folder_below_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
    write(tmp_path, {"a.txt": b"trains", "q.txt": b"validates", "closed/b.txt": b"?", ".closed/b.txt": b"?"})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"data\.path: cannot read '.*/closed': .*Permission denied") as error:
        open_source(DataConfig(dataset="text", path=str(tmp_path)))
    assert "/.closed" not in str(error.value)


@pytest.mark.parametrize(
    ("names", "count", "split"),
    [(["a.txt", "b.txt"], 2, "validation"), (["q.txt"], 1, "train"), (["a.txt", "17.txt"], 2, "validation")],
)
def test_a_folder_with_an_empty_split_is_refused_before_it_is_read(
    tmp_path, monkeypatch, names, count, split
):
    write(tmp_path, dict.fromkeys(names, b"text") | {"20.txt": b"\0"})
    monkeypatch.setattr(sources, "read", lambda path: pytest.fail(f"{path} read"))
    with pytest.raises(
        UserError, match=r"data\.path: no text .*; give more files, or one file in place of"
    ) as error:
        open_source(DataConfig(dataset="text", path=str(tmp_path)))
    assert f"falls into its {split} split" in str(error.value) and f"here {count} of text" in str(error.value)


def test_a_folder_may_lack_a_test_split(tmp_path):
    write(tmp_path, {"a.txt": b"trains", "q.txt": b"validates"})
    found = documents(DataConfig(dataset="text", path=str(tmp_path)))
    assert {split: len(found[split]) for split in SPLITS} == {"train": 1, "validation": 1, "test": 0}


def test_a_gzip_file_cut_off_anywhere(tmp_path):
    whole = gzip.compress(b"some text " * 50)
    for length in range(1, len(whole)):
        (tmp_path / "cut.gz").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"data\.path: cannot read '.*cut\.gz': ") as error:
            open_source(DataConfig(dataset="text", path=str(tmp_path / "cut.gz"))).survey()
        assert "\n" not in str(error.value)


def test_a_file_of_another_size_is_not_read_to_see_that_it_is_not_enwik8(tmp_path, monkeypatch):
    (tmp_path / "enwik9").write_bytes(b"0123456789")
    monkeypatch.setattr(sources, "read", lambda path: pytest.fail(f"{path} read"))
    with pytest.raises(UserError, match="this one has 10 bytes"):
        open_source(DataConfig(dataset="enwik8", path=str(tmp_path / "enwik9")))


@pytest.mark.parametrize(
    ("dataset", "path", "message"),
    [
        ("stdlb", "", "unknown data.dataset 'stdlb': did you mean 'stdlib'? known are "),
        ("tdfs:lm1b", "", "unknown data.dataset 'tdfs:lm1b': "),
        ("stdlib", "x", "data.path = 'x': must be empty with data.dataset = 'stdlib'"),
        (
            "enwik8",
            "",
            "data.path = '': must name enwik8, plain or .gz: a file of 100,000,000 bytes with sha256 2b49",
        ),
        ("enwik8", "{tmp}", "there is no such file"),
        ("enwik8", "{tmp}/short", "this one has 3 bytes"),
        ("text", "", "data.path = '': must name an existing file or folder of text"),
        ("text", "{tmp}/none", "none': must name an existing file or folder of text"),
        ("text", "{tmp}/empty", "this file is empty"),
        ("text", "{tmp}/folder", "there is no text in this folder"),
        ("text", "{tmp}/bad.gz", "data.path: cannot read "),
        ("text", "{tmp}/cut.gz", "data.path: cannot read "),
        ("tfds:lm2b", "{tmp}", "unknown data.dataset 'tfds:lm2b': did you mean 'tfds:lm1b'? "),
        ("tfds:", "{tmp}", "data.dataset = 'tfds:': must name a text dataset"),
    ],
)
def test_bad_input_is_one_line_that_helps(tmp_path, dataset, path, message):
    write(tmp_path, {"short": b"abc", "empty": b"", "folder/binary": b"\0", "bad.gz": b"not gzip"})
    write(tmp_path, {"cut.gz": gzip.compress(bytes(1000))[:-9]})
    with pytest.raises(UserError) as caught:
        list(open_source(DataConfig(dataset=dataset, path=path.format(tmp=tmp_path))).documents("train"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


class ToyTextDataset(tfds.core.GeneratorBasedBuilder):
    """Stands for any TFDS text dataset: its splits are what `configured` says."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # TFDS would look for checksums beside the code
    configured: dict[str, int]
    feature = "text"

    def _info(self):
        features = {self.feature: tfds.features.Text(), "label": np.int64}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split, n) for split, n in self.configured.items()}

    def _generate_examples(self, split, n):
        for i in range(n):
            yield i, {self.feature: f"{split} {i}", "label": i}


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ({"train": 4, "validation": 2, "test": 1}, {"train": 4, "validation": 2, "test": 1}),
        ({"train": 40, "test": 3}, {"train": 38, "validation": 2, "test": 3}),
        ({"train": 40}, {"train": 36, "validation": 2, "test": 2}),
    ],
)
def test_tfds_by_name(tmp_path, monkeypatch, splits, expected):
    monkeypatch.setattr(ToyTextDataset, "configured", splits, raising=False)
    found = documents(DataConfig(dataset="tfds:toy_text_dataset", path=str(tmp_path)))
    assert {split: len(found[split]) for split in SPLITS} == expected
    # What is missing was the end of train, in order, and no document is lost or doubled.
    texts = [data.decode() for split in SPLITS for _, data in found[split]]
    assert sorted(texts) == sorted(f"{split} {i}" for split, n in splits.items() for i in range(n))
    assert [data for _, data in found["train"]] == [f"train {i}".encode() for i in range(expected["train"])]


def test_tfds_takes_the_only_text_feature(tmp_path, monkeypatch):
    monkeypatch.setattr(ToyTextDataset, "configured", {"train": 20}, raising=False)
    monkeypatch.setattr(ToyTextDataset, "feature", "body")
    assert (
        documents(DataConfig(dataset="tfds:toy_text_dataset", path=str(tmp_path)))["train"][0][1]
        == b"train 0"
    )


def test_tfds_that_cannot_be_prepared(tmp_path, monkeypatch):
    def offline(self, dl_manager):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(ToyTextDataset, "_split_generators", offline)
    with pytest.raises(UserError) as caught:
        open_source(DataConfig(dataset="tfds:toy_text_dataset", path=str(tmp_path)))
    assert str(caught.value).startswith("data.dataset = 'tfds:toy_text_dataset': must name a text dataset")
    assert str(caught.value).endswith("ConnectionError: no route")


def test_tfds_without_text(tmp_path, monkeypatch):
    monkeypatch.setattr(ToyTextDataset, "configured", {"train": 20}, raising=False)

    def info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"label": np.int64}))

    def examples(self, split, n):
        for i in range(n):
            yield i, {"label": i}

    monkeypatch.setattr(ToyTextDataset, "_info", info)
    monkeypatch.setattr(ToyTextDataset, "_generate_examples", examples)
    with pytest.raises(UserError, match="must have one text feature"):
        open_source(DataConfig(dataset="tfds:toy_text_dataset", path=str(tmp_path)))
