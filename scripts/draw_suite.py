"""Pictures for GenEval, DPG-Bench or T2I-CompBench: draw_suite.py geneval --prompts evaluation_metadata.jsonl
--pipeline runs/x/export --output geneval"""

from fewstep.commands.draw_suite import draw_suite

if __name__ == "__main__":
    draw_suite(__doc__ or "")
