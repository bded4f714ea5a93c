# Everything about an experiment on one page, and the index of all pages.


rule build_report:
    input:
        unpack(inputs_of("build_report")),
    output:
        report=report(
            "results/reports/{experiment}/report.html",
            caption="../workflow/report/captions/report.rst",
            category="Experiments",
            labels={"experiment": "{experiment}"},
        ),
        summary="results/reports/{experiment}/summary.json",
    log:
        "logs/build_report/{experiment}.log",
    benchmark:
        "logs/build_report/{experiment}.tsv"
    localrule: True
    conda:
        "../envs/snakegpt.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        settings=settings_of("build_report"),
        code=code_of_stage("build_report"),
        arguments=arguments_of("build_report"),
    shell:
        "python -m snakegpt.run {params.arguments:q} --threads {threads} --provenance --log {log:q}"


rule build_index:
    input:
        unpack(inputs_of("build_index")),
    output:
        index=report(
            "results/reports/index.html",
            caption="../workflow/report/captions/index.rst",
            category="Index",
        ),
    log:
        "logs/build_index/all.log",
    benchmark:
        "logs/build_index/all.tsv"
    localrule: True
    conda:
        "../envs/snakegpt.yaml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=10,
    params:
        settings=settings_of("build_index"),
        code=code_of_stage("build_index"),
        arguments=arguments_of("build_index"),
    shell:
        "python -m snakegpt.run {params.arguments:q} --threads {threads} --log {log:q}"
