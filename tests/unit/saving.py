"""A save of a small folder, and the check that what stands there is whole."""

from tiny import files_in, tiny_runtime

from oneshot.checkpoint.disk.folders import replacing


def save(folder, text):
    """A save of two files with one content, of which a half-written folder has one or a wrong one."""
    with replacing(tiny_runtime(), folder) as temporary:
        (temporary / "one").write_text(text)
        (temporary / "sub").mkdir()
        (temporary / "sub" / "two").write_text(text)


def whole(folder):
    """The content of a complete folder, or none if there is no folder; a half one fails."""
    if not folder.exists():
        return None
    files = files_in(folder)
    assert set(files) == {"one", "sub/two"}, "half a folder"
    assert len(set(files.values())) == 1, "a mixture of two folders"
    return files["one"].decode()
