"""`miles-plugins`: look at what is installed, and rehearse a launch."""

from __future__ import annotations

import sys

import click

from miles_plugins.entrypoints.bench_draft import bench_draft
from miles_plugins.entrypoints.check_fp8 import check_fp8
from miles_plugins.entrypoints.convert_bf16 import convert_bf16
from miles_plugins.entrypoints.convert_fp8 import convert_fp8
from miles_plugins.entrypoints.convert_int4 import convert_int4
from miles_plugins.entrypoints.doctor import doctor
from miles_plugins.entrypoints.explain import explain
from miles_plugins.entrypoints.fingerprint import fingerprint
from miles_plugins.entrypoints.list_plugins import list_plugins
from miles_plugins.entrypoints.memory import memory
from miles_plugins.entrypoints.plan import plan
from miles_plugins.entrypoints.rehearse import rehearse
from miles_plugins.entrypoints.verify import verify


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="miles-plugins")
def main() -> None:
    """Plugins for an unmodified slime. Turn them on with `slime-train --plugins NAME,… <slime flags>`."""


main.add_command(bench_draft)
main.add_command(check_fp8)
main.add_command(convert_bf16)
main.add_command(convert_fp8)
main.add_command(convert_int4)
main.add_command(doctor)
main.add_command(explain)
main.add_command(fingerprint)
main.add_command(list_plugins)
main.add_command(memory)
main.add_command(plan)
main.add_command(rehearse)
main.add_command(verify)

if __name__ == "__main__":
    sys.exit(main())
