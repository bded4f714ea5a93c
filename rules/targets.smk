# Names people type. For each experiment: plan_, train_, evaluate_, sample_ and report_<name>.


rule all:
    default_target: True
    input:
        expand(
            "results/reports/{experiment}/report.html",
            experiment=SETTINGS.default_experiments,
        ),
        "results/reports/index.html",
    localrule: True


for target, result in TARGETS.items():
    for experiment in SETTINGS.experiments:

        rule:
            name:
                f"{target}_{experiment}"
            input:
                result.format(experiment=experiment),
            localrule: True


user_error_as_workflow_error(refuse_unknown_targets)
