# Sourced, not run: `source scripts/setup_venv.sh requirements.txt`. Makes .venv in the toolkit's folder where there is
# none, installs the requirements file unless exactly that was done before, and activates the environment.
# PYTHON=python3.12 chooses the interpreter of a new .venv; one that exists is used as it is.

_toolkit=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
_requirements=${1:-requirements.txt}
_stop() {
  echo "error: $1" >&2
  exit 2
}

[ -f "$_toolkit/$_requirements" ] || _stop "there is no $_toolkit/$_requirements; give requirements.txt or requirements-dev.txt"
if ! "$_toolkit/.venv/bin/python" -c "" 2> /dev/null; then
  _python=${PYTHON:-python3}
  _version=$("$_python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null) \
    || _stop "cannot run $_python; install Python 3.11 to 3.13, or name one as PYTHON=/path/to/python3.12"
  case $_version in
    3.11 | 3.12 | 3.13) ;;
    *) _stop "$_python is Python $_version; name one of 3.11 to 3.13, as PYTHON=/path/to/python3.12" ;;
  esac
  "$_python" -m venv --clear "$_toolkit/.venv" > /dev/null \
    || _stop "$_python cannot make $_toolkit/.venv; on Debian and Ubuntu: apt install python$_version-venv"
fi
source "$_toolkit/.venv/bin/activate"

# The stamp is the content of all such files: requirements-dev.txt includes others.
_wanted=$(cat "$_toolkit"/requirements*.txt | cksum)
_stamp=$_toolkit/.venv/installed-$_requirements
if [ "$(cat "$_stamp" 2> /dev/null || true)" != "$_wanted" ]; then
  echo "installing $_requirements into $_toolkit/.venv"
  python -m pip install --quiet --disable-pip-version-check -r "$_toolkit/$_requirements" \
    || _stop "pip could not install $_requirements; its message is above"
  echo "$_wanted" > "$_stamp"
fi
