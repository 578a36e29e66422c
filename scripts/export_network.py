"""Write a network of a run into a copy of its model's folder, for student.path or fake_score.path of another run."""

from fewstep.commands.export import export_network_folder

if __name__ == "__main__":
    export_network_folder(__doc__ or "")
