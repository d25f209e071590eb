"""``python -m bench.fetch_vllm``: fetch the source files of the vllm-triton variant.

The wheel has hundreds of megabytes, the files have kilobytes: they are read out of it over HTTP
ranges, from the index that pip is configured with.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

from remotezip import RemoteIOError, RemoteZip

from bench.vllm_triton import FILES, FOLDER, VERSION

PIP = (sys.executable, "-m", "pip")
WHEEL = ("--quiet", "--no-deps", "--only-binary=:all:", f"vllm=={VERSION}")


def wheel_url(scratch: Path) -> str:
    """Where pip would download the wheel from; fast-deps keeps it from doing so."""
    report = scratch / "report.json"
    options = ("--dry-run", "--ignore-installed", "--use-feature=fast-deps", "--report", report)
    subprocess.run([*PIP, "install", *options, *WHEEL], check=True)
    url: str = json.loads(report.read_text())["install"][0]["download_info"]["url"]
    return url


def open_wheel(scratch: Path) -> ZipFile:
    """The wheel over ranges, or all of it where the index does not serve any."""
    try:
        ranges: ZipFile = RemoteZip(wheel_url(scratch))
        return ranges
    except RemoteIOError as error:
        sys.stderr.write(f"no ranges ({error}): downloading the whole wheel\n")
    subprocess.run([*PIP, "download", "--dest", scratch, *WHEEL], check=True)
    return ZipFile(next(scratch.glob("*.whl")))


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch, open_wheel(Path(scratch)) as wheel:
        wheel.extractall(FOLDER, FILES)
    sys.stdout.write(f"{len(FILES)} files of vLLM {VERSION} in {FOLDER}\n")


if __name__ == "__main__":
    main()
