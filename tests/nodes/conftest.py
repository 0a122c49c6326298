"""What nodes write goes away with the test."""

import pytest


@pytest.fixture(autouse=True)
def own_output(request, tmp_path, monkeypatch):
    """An output folder that holds nothing, for tests that have ComfyUI."""
    if request.node.get_closest_marker("comfy") is None:
        return
    import folder_paths

    (tmp_path / "output").mkdir()
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
