#!/usr/bin/env bash
# All tiers of tests, one after the other, each announced and timed. No tier is left out silently: one
# that finds no test, or skips one, has failed. Tiers that need images are failed without them.
#
#   tools/test.sh              every tier
#   tools/test.sh check unit   only these
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

all=(check unit images vm trial)
[ $# -gt 0 ] && chosen=("$@") || chosen=("${all[@]}")
passed=0 failed=0 images_failed=no summary=()

run_tier() {
  case $1 in
    check) make --no-print-directory check ;;
    unit) .venv/bin/pytest -q -m 'not vm and not trial' ;;
    images) .venv/bin/hotcell build --all ;;
    vm | trial)
      if [ "$images_failed" = yes ]; then
        echo "the images could not be built, so this tier cannot run"
        return 1
      fi
      HOTCELL_NO_SKIP=1 .venv/bin/pytest -q -m "$1"
      ;;
    *)
      echo "tools/test.sh: no tier named $1; there are: ${all[*]}" >&2
      return 2
      ;;
  esac
}

for tier in "${chosen[@]}"; do
  printf '\n== %s\n' "$tier"
  start=$SECONDS
  if run_tier "$tier"; then
    result=passed passed=$((passed + 1))
  else
    result=FAILED failed=$((failed + 1))
    [ "$tier" = images ] && images_failed=yes
  fi
  summary+=("$(printf '%-8s %s in %d s' "$tier" "$result" $((SECONDS - start)))")
  printf '== %s\n' "${summary[-1]}"
done

printf '\n'
printf '%s\n' "${summary[@]}"
printf 'tiers: %d passed, %d failed\n' "$passed" "$failed"
[ "$failed" -eq 0 ]
