"""Judge pipelines or folders of pictures and write a page: report.html, report.md and report.json.

Samples are drawn into OUTPUT/samples once, by this process or by all of `accelerate launch`; the same command goes on
after an interruption, and other metrics are taken of the same samples.
"""

from fewstep.commands.evaluate_image import evaluate_image

if __name__ == "__main__":
    evaluate_image(__doc__ or "", classifier="assets/digits_image/classifier")
