#!/usr/bin/env bash
# Every linter and type checker, all of them even if one complains. Needs no network and no root.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
bin=.venv/bin
export ANSIBLE_HOME="${TMPDIR:-/tmp}/hotcell-ansible-lint" PATH="$PWD/$bin:$PATH"
failed=()

gate() {
  local name=$1 start=$SECONDS output
  shift
  if output=$("$@" 2>&1); then
    printf 'check: %-14s ok, %d s\n' "$name" $((SECONDS - start))
  else
    printf '%s\n' "$output"
    printf 'check: %-14s FAILED, %d s\n' "$name" $((SECONDS - start))
    failed+=("$name")
  fi
}

# files with a shell's shebang, and *.sh without one; templates are not shell until they are rendered
shell_files() {
  git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do
      case $file in *.j2) continue ;; esac
      [ -f "$file" ] || continue
      case $file in *.sh) printf '%s\0' "$file" && continue ;; esac
      IFS= read -r first <"$file" 2>/dev/null || true
      case ${first:-} in '#!'*/sh | '#!'*/bash | '#!'*'env bash' | '#!'*'env sh') printf '%s\0' "$file" ;; esac
    done
}

gate ruff "$bin/ruff" check .
gate format "$bin/ruff" format --check .
gate mypy "$bin/mypy"
# Tests are checked too: what needs real machines fails late, and a fake must have the shape of the real thing.
gate 'mypy, tests' "$bin/mypy" --explicit-package-bases tests
mapfile -d '' -t shells < <(shell_files 2>/dev/null)
gate shellcheck shellcheck "${shells[@]}"
gate yamllint "$bin/yamllint" --strict .
gate ansible-lint "$bin/ansible-lint" --offline --profile production --strict -q ansible

if [ "${#failed[@]}" -gt 0 ]; then
  echo "check: failed: ${failed[*]}" >&2
  exit 1
fi
