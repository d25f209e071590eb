"""Every check of the project as one command: ``nox -s NAME``; ``nox -l`` lists them.

Sessions make their own virtual environment and install into it under ``constraints.txt``. The
``*_gpu`` sessions, ``parity_soak``, ``sanitize`` and ``bench`` use the environment nox runs in, for
machines where torch and the FlashAttention binaries are installed already.
"""

import os
import shutil
import subprocess
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.error_on_external_run = True
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "imports"]

CONSTRAINTS = ("-c", "constraints.txt")
# With one of these a run of the harness is not divided, also as --shard=1/2.
ALONE = ("--output", "--shard", "--plan-only", "--help")
# The tests run in parallel processes; one thread each keeps those from fighting over the cores.
TEST_ENV = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run_lint(session: nox.Session) -> None:
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


def run_pytest(session: nox.Session, *options: str, external: bool = False) -> None:
    arguments = session.posargs or ["tests", "parity_tests", *options]
    session.run("python", "-m", "pytest", "-q", *arguments, env=TEST_ENV, external=external)


@nox.session
def lint(session: nox.Session) -> None:
    """Style: ruff check and ruff format --check."""
    session.install(*CONSTRAINTS, "ruff")
    run_lint(session)


@nox.session
def types(session: nox.Session) -> None:
    """Types: mypy --strict."""
    session.install(*CONSTRAINTS, "-e", ".[lint,test]")
    session.run("mypy")


@nox.session
def imports(session: nox.Session) -> None:
    """Who may import whom: the import contracts of pyproject.toml."""
    session.install(*CONSTRAINTS, "import-linter")
    session.run("lint-imports", "--no-cache")


@nox.session
def tests(session: nox.Session) -> None:
    """Everything that needs no GPU: lint, types, import contracts, then the tests.

    One environment serves all four, because torch is the larger part of the installation.
    Arguments after ``--`` go to pytest and skip the other three.
    """
    session.install(*CONSTRAINTS, "-e", ".[lint,test]")
    if not session.posargs:
        run_lint(session)
        session.run("mypy")
        session.run("lint-imports", "--no-cache")
    run_pytest(session, "-n", os.environ.get("TEST_PROCESSES", "2"), "--dist", "loadgroup")


@nox.session
def parity(session: nox.Session) -> None:
    """The main job: every backend that works here against the fp64 reference, with a report."""
    session.install(*CONSTRAINTS, "-e", ".[parity]")
    session.run("python", "-m", "parity_tests", *session.posargs)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel, install it in a clean environment and import it from elsewhere."""
    session.install("hatchling")
    dist = session.create_tmp()
    session.run("python", "-m", "hatchling", "build", "-t", "wheel", "-d", dist)
    newest = max(Path(dist).glob("*.whl"), key=lambda path: path.stat().st_mtime)
    session.install(*CONSTRAINTS, str(newest))
    with session.chdir(dist):
        session.run("python", "-c", "import triton_fa; print(triton_fa.__file__)")


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """The documentation as a site, into site/."""
    session.install(*CONSTRAINTS, "-e", ".[docs]")
    session.run("mkdocs", "build", *session.posargs)


@nox.session(default=False)
@nox.parametrize("triton", ["3.6.0", "newest"])
def portability(session: nox.Session, triton: str) -> None:
    """Compile every kernel and tile for every chip: ``nox -s portability -- --target gfx942``."""
    session.install(*CONSTRAINTS, "-e", ".")
    if triton == "newest":
        session.install(*CONSTRAINTS, "--upgrade", "triton")
    else:
        session.install(f"triton=={triton}")
    session.run("python", "-m", "tests.portability", *session.posargs)


@nox.session(default=False)
def mutants(session: nox.Session) -> None:
    """Whether the tests notice bugs put into the kernels: ``nox -s mutants -- --only NAME``."""
    session.install(*CONSTRAINTS, "-e", ".[test]")
    session.run("python", "-m", "tests.mutants", *session.posargs)


@nox.session(default=False)
def mutants_operators(session: nox.Session) -> None:
    """The same for the Python beside the kernels, with mutmut's operators: what survives."""
    session.install(*CONSTRAINTS, "-e", ".[mutants]")
    session.run("mutmut", "run", *session.posargs, env=TEST_ENV)
    session.run("mutmut", "results")


@nox.session(default=False)
@nox.parametrize("transformers", ["5.17.0", "newest"])
def integrations(session: nox.Session, transformers: str) -> None:
    """The package inside other frameworks, on the CPU: the oldest transformers and the newest."""
    session.install(*CONSTRAINTS, "-e", ".[integrations]")
    if transformers != "newest":
        # With its extra, for it admits one minor version of kernels only.
        session.install(*CONSTRAINTS, f"transformers[kernels]=={transformers}")
    arguments = session.posargs or ["tests/integrations"]
    session.run("python", "-m", "pytest", "-q", *arguments, env=TEST_ENV)


def run_parity_on_all_gpus(session: nox.Session, *arguments: str) -> None:
    """A share of the cases on each visible GPU at the same time, and one report of them all."""
    gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    if not gpus and shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
        gpus = [str(index) for index in range(listed.stdout.count("GPU "))]
    command = ["python", "-m", "parity_tests", *arguments]
    if len(gpus) <= 1 or any(argument.startswith(ALONE) for argument in arguments):
        session.run(*command, external=True)
        return
    folders = [f"parity-report/share-{i}" for i in range(1, len(gpus) + 1)]
    for folder in folders:  # no report of an earlier run stands in for one that was not written
        shutil.rmtree(folder, ignore_errors=True)
    shares = [
        subprocess.Popen(
            [*command, "--shard", f"{i}/{len(gpus)}", "--output", folder],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu},
        )
        for i, (gpu, folder) in enumerate(zip(gpus, folders, strict=True), start=1)
    ]
    for share in shares:
        share.wait()  # its verdict is part of the joint one
    reports = [f"{folder}/parity.json" for folder in folders]
    lenient = [argument for argument in arguments if argument == "--no-strict-known"]
    joint = ("merge", *reports, "--output", "parity-report", *lenient)
    session.run("python", "-m", "parity_tests", *joint, external=True)


@nox.session(venv_backend="none", default=False)
def parity_gpu(session: nox.Session) -> None:
    """The main job in this environment, on all GPUs, with every peer required to be present."""
    run_parity_on_all_gpus(session, *(session.posargs or ["--require-peers"]))


@nox.session(venv_backend="none", default=False)
def parity_soak(session: nox.Session) -> None:
    """20000 generated cases on all GPUs; another seed with ``-- --soak 20000 --seed 1``.

    A session that was stopped goes on where it was. ``-- --soak 20000 --shard 1/4`` runs a share.
    """
    asked = session.posargs or ["--soak", "20000"]
    command = ("python", "-m", "parity_tests", *asked)
    if any(argument.startswith(ALONE) for argument in asked):
        session.run(*command, external=True)
        return
    folder, count = "parity-report/shares", 400
    options = ("--output", folder, "shares", "--count", str(count))
    session.run(*command, *options, external=True, success_codes=[0, 1])  # merging says which
    reports = [f"{folder}/{index}/parity.json" for index in range(1, count + 1)]
    lenient = [argument for argument in asked if argument == "--no-strict-known"]
    joint = ("merge", *reports, "--output", "parity-report", *lenient)
    session.run("python", "-m", "parity_tests", *joint, external=True)


@nox.session(venv_backend="none", default=False)
def sanitize(session: nox.Session) -> None:
    """Small calls of every kernel under compute-sanitizer: ``nox -s sanitize -- --tool racecheck``.

    ``-- --output FILE`` keeps a record, ``-- --shard 1/4`` runs a share, and
    ``-- --join RECORD... --output FILE`` makes one record of those of all shares.
    """
    session.run("python", "-m", "parity_tests.sanitize", *session.posargs, external=True)


@nox.session(venv_backend="none", default=False)
def tests_gpu(session: nox.Session) -> None:
    """The tests in this environment: kernels on the GPU, then all else in the interpreter."""
    files = session.posargs or ["tests", "parity_tests"]
    command = ("python", "-m", "pytest", "-q", *files)
    session.run(*command, "-m", "gpu or device", env=TEST_ENV, external=True)
    hidden = TEST_ENV | {"CUDA_VISIBLE_DEVICES": ""}
    session.run(*command, "-m", "not gpu", env=hidden, external=True)


@nox.session(default=False)
def browser(session: nox.Session) -> None:
    """The pages of results in headless Chromium (Debian's package chromium)."""
    if not shutil.which("chromium"):
        session.skip("no chromium on PATH: apt-get install chromium")
    session.install(*CONSTRAINTS, "-e", ".[bench,test]")
    test = "tests/test_bench_report.py::test_the_page_renders_in_a_browser"
    session.run("python", "-m", "pytest", "-q", test, env=TEST_ENV)


@nox.session(venv_backend="none", default=False)
def bench(session: nox.Session) -> None:
    """Benchmarks in this environment: ``nox -s bench -- decode --rows b16``."""
    for arguments in [session.posargs] if session.posargs else [["decode"], ["prefill"]]:
        session.run("python", "-m", "bench", *arguments, external=True)


@nox.session(default=False)
def report(session: nox.Session) -> None:
    """A page of benchmark results in bench-report/: the committed ones, or ``-- FILE...``."""
    session.install(*CONSTRAINTS, "-e", ".[bench]")
    found = Path("bench", "results").rglob("*.json")
    # Those of engines have no rows of single calls.
    results = session.posargs or sorted(str(p) for p in found if "engines" not in p.parts)
    session.run("python", "-m", "bench", "report", *results)
