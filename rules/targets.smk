# Names people type. For each experiment: scaling_, plan_, train_, evaluate_, sample_ and report_<name>.


for target, result in TARGETS.items():
    for experiment in SETTINGS.experiments:

        rule:
            name:
                f"{target}_{experiment}"
            input:
                result.format(experiment=experiment),
            localrule: True


user_error_as_workflow_error(refuse_unknown_targets)
