"""python -m onnxprune."""

from onnxprune.cli import run

if __name__ == "__main__":
    run()
