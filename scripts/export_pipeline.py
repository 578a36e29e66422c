"""Write the student of a run as a diffusers pipeline: python scripts/export_pipeline.py --run runs/digits_1step"""

from fewstep.commands.export import export_pipeline

if __name__ == "__main__":
    export_pipeline(__doc__ or "")
