"""Environments that ``make test`` is not: other versions of Python and Triton, and the built package alone.

``nox -l`` lists them, ``nox -s package`` runs one. Each installs torch: where the default index serves builds with
CUDA, ``PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu`` saves gigabytes.
"""

from pathlib import Path

import nox

nox.options.sessions = ["package"]
TORCH = "torch==2.13.0"
EXTRAS = ".[analysis,bench,cli,dev,docs,examples,hf,st]"
SUITE = ("pytest", "tests", "-n", "auto", "--dist", "worksteal", "-p", "no:benchmark")


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """The suite on one Python."""
    session.install(TORCH)
    session.install("-e", EXTRAS)
    session.run(*SUITE, *session.posargs)


@nox.session
@nox.parametrize("triton", ["3.7", "3.9"])
def interpreter(session: nox.Session, triton: str) -> None:
    """Triton's kernels, in its interpreter, of one version of Triton."""
    session.install(TORCH)
    session.install("-e", EXTRAS)
    session.install(f"triton=={triton}.*")
    session.run(*SUITE, "-m", "interpreter", *session.posargs, env={"TRITON_INTERPRET": "1"})


@nox.session
def newest(session: nox.Session) -> None:
    """The suite on the newest torch there is, release candidates included."""
    session.install("--pre", "torch")
    session.install("-e", EXTRAS)
    session.run(*SUITE, *session.posargs)


@nox.session
def versions(session: nox.Session) -> None:
    """Headers of torch 2.10 and 2.11, and Triton 3.6: compiled against, not run."""
    session.install(TORCH)
    session.install("-e", ".")
    session.run("python", "tests/check_versions.py", *session.posargs)


@nox.session
@nox.parametrize("kind", ["wheel", "sdist"])
def package(session: nox.Session, kind: str) -> None:
    """What would be uploaded, installed where nothing else is, run away from the tree."""
    session.install("build", TORCH)
    folder = Path(session.create_tmp()).resolve()
    session.run("python", "-m", "build", f"--{kind}", "--outdir", str(folder), silent=True)
    (built,) = folder.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    session.install(str(built))
    check = Path("tests/check_install.py").resolve()
    session.chdir(folder)
    for backend in ("cpu", "reference"):
        session.run("python", "-I", str(check), env={"REPDEG_FAST_BACKEND": backend})


@nox.session
def prebuilt(session: nox.Session) -> None:
    """The wheel that brings its C++ kernels, installed where there is no compiler; it stays in dist/."""
    session.install("wheel", TORCH)
    session.install("-e", ".")
    session.run("python", "benchmarks/prebuilt_wheel.py", "dist")
    session.run("python", "-m", "pip", "uninstall", "-q", "-y", "repdeg-fast", "ninja", "pybind11")
    _check_without_compiler(session)


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
@nox.parametrize("torch", ["2.10.0", "2.13.0"])
def prebuilt_on(session: nox.Session, torch: str) -> None:
    """That wheel, from dist/, on another Python and the oldest torch."""
    session.install(f"torch=={torch}")
    _check_without_compiler(session)


def _check_without_compiler(session: nox.Session) -> None:
    (built,) = Path("dist").resolve().glob("*manylinux*.whl")
    check = Path("tests/check_install.py").resolve()
    session.install("--no-deps", str(built))
    session.chdir(session.create_tmp())
    without_compiler = {"PATH": session.bin, "REPDEG_FAST_BACKEND": "cpu", "REPDEG_FAST_CACHE_DIR": "cache"}
    session.run("python", "-I", str(check), env=without_compiler)
    assert not list(Path("cache").rglob("*.so")), "something was compiled"
