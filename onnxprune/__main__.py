"""The program: `onnxprune`, or python -m onnxprune."""

from onnxprune import interrupt


def run() -> None:
    """Hear Ctrl-C, then import and do what the command line says."""
    interrupt.hear(interrupt.leave)
    from onnxprune import cli

    cli.run()


if __name__ == "__main__":
    run()
