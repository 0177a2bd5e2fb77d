# What .ci/run and .ci/nightly share; it is sourced. It finds the supported Pythons (`pythons`, of which `default` runs what one
# Python is enough for), installs the Debian packages that tests need if it may, and defines `step`, `beside` and `finish`.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

supported="3.11 3.12 3.13"
failed=()
skipped=()
background=()

# usable PYTHON MINOR: it starts (a pyenv shim may not), is that version, and can make environments.
usable() {
  [ "$("$1" -I -c 'import ensurepip, ssl, sqlite3, sys, venv; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$2" ]
}

# candidates MINOR: where that Python may be.
candidates() {
  local root
  type -aP "python$1"
  for root in "${PYENV_ROOT:-}" "${HOME:-}/.pyenv"; do
    [ -n "$root" ] && printf '%s\n' "$root/versions/"*"/bin/python$1"
  done
}

default_python() {
  python3 -I -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Debian ships venv apart from Python.
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  packages=()
  default_python || packages+=(python3-venv)
  for minor in $supported; do
    python="/usr/bin/python$minor"
    [ -x "$python" ] && ! usable "$python" "$minor" && packages+=("python$minor-venv")
  done
  # Tests start these as programs of their own; promtool comes with prometheus.
  command -v prometheus >/dev/null && command -v promtool >/dev/null || packages+=(prometheus)
  command -v chromium >/dev/null || packages+=(chromium)
  if [ "${#packages[@]}" -gt 0 ]; then
    echo "== installing ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    # Debian starts a service when its package is installed, unless this file forbids it.
    policy=/usr/sbin/policy-rc.d
    if [ -e "$policy" ]; then
      policy=
    else
      trap 'rm -f "$policy"' EXIT
      printf '#!/bin/sh\nexit 101\n' >"$policy"
      chmod +x "$policy"
    fi
    apt-get update -qq
    for package in "${packages[@]}"; do
      apt-get install -qq -y --no-install-recommends "$package" >/dev/null || echo "could not install $package"
    done
    [ -z "$policy" ] || rm -f "$policy"
    trap - EXIT
    # Nor shall it start with the machine.
    case " ${packages[*]} " in
      *" prometheus "*) systemctl disable --quiet prometheus >/dev/null 2>&1 ;;
    esac
  fi
fi

for program in prometheus chromium; do
  command -v "$program" >/dev/null || skipped+=("tests that need $program: it is not installed and could not be")
done

pythons=()
for minor in $supported; do
  found=
  while IFS= read -r python; do
    if [ -x "$python" ] && usable "$python" "$minor"; then
      pythons+=("$python")
      found=1
      break
    fi
  done < <(candidates "$minor")
  [ -n "$found" ] || skipped+=("Python $minor: there is none with venv and ensurepip")
done
if [ "${#pythons[@]}" -eq 0 ]; then
  echo "no usable Python found; one of $supported with venv and ensurepip is needed" >&2
  exit 1
fi

# version PYTHON: such as 3.12.
version() {
  "$1" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])'
}

default=python3
default_python || default="${pythons[-1]}"
echo "== default: $(command -v "$default"), $("$default" -V)"
for python in "${pythons[@]}"; do
  echo "== found:   $python, $("$python" -V)"
done

# step NAME COMMAND...: run it, time it, remember a failure.
step() {
  local name="$1" started=$SECONDS code=0
  shift
  echo
  echo "== $name"
  "$@" || code=$?
  echo "== $name: exit code $code, $((SECONDS - started)) s"
  [ "$code" -eq 0 ] || failed+=("$name")
}

# beside NAME COMMAND...: as step, while the next steps run; `finish` waits for it and prints its output.
beside() {
  local log
  log="$(mktemp)"
  (failed=(); step "$@"; exit "${#failed[@]}") >"$log" 2>&1 &
  background+=("$!" "$1" "$log")
}

# finish: say what failed and what was skipped, and end.
finish() {
  while [ "${#background[@]}" -gt 0 ]; do
    wait "${background[0]}" || failed+=("${background[1]}")
    cat "${background[2]}"
    rm -f "${background[2]}"
    background=("${background[@]:3}")
  done
  echo
  for what in "${skipped[@]}"; do
    echo "== skipped: $what"
  done
  if [ "${#failed[@]}" -gt 0 ]; then
    echo "== failed: ${failed[*]}"
    exit 1
  fi
  echo "== all passed in $SECONDS s"
}
