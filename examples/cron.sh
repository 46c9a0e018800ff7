#!/usr/bin/env bash
# Captions what is new in a folder, for cron. As a line of `crontab -e`, every ten minutes:
#
#     */10 * * * * /path/to/specvlm/examples/cron.sh /data/incoming /data/captions
#
# It prints nothing, so that cron mails nothing, unless something goes wrong. A start that finds the one before
# still at work leaves at once (--if-locked skip), so no flock is needed. A file that changed within the last
# minute may still be on its way, and is left for the next start (--min-age).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
videos=${1:-$root/examples/videos}
out=${2:-$root/cron-out}

PATH=$root/.venv/bin:$PATH # cron has no active environment
mkdir -p "$out"
exec specvlm caption "$videos" --preset demo --min-age 60s --if-locked skip -q --log-file "$out/cron.log" -o "$out"
