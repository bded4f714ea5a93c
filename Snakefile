# snakegpt: text in; a trained, evaluated and reported GPT out.
#
#   snakemake --cores 8 train_gpt2            train one experiment
#   snakemake --cores 8                       the reports of the default experiments
#   snakemake -n report_gpt2                  what would run
#   snakemake --cores 8 train_gpt2 --config scale=full
#
# The experiments stand in config.yaml, what each stage reads and writes in workflow/snakegpt/pipeline.py.
from snakemake.utils import min_version

min_version("9.0")


configfile: "config.yaml"


include: "rules/common.smk"


onstart:
    prepare_slurm()


rule all:
    default_target: True
    input:
        expand(
            "results/reports/{experiment}/report.html",
            experiment=SETTINGS.default_experiments,
        ),
        "results/reports/index.html",
    localrule: True


include: "rules/data.smk"
include: "rules/network.smk"
include: "rules/model.smk"
include: "rules/evaluation.smk"
include: "rules/report.smk"
include: "rules/targets.smk"
