# Text to tokens: pinned downloads (of weights too), tokenizers, shards of ids and their manifest.


rule lock_corpora:
    log:
        "logs/lock_corpora/all.log",
    localrule: True
    conda:
        "../envs/snakegpt.yaml"
    threads: 1
    params:
        # Each once: Snakemake names the Snakefile's own again at the end, where it would win.
        configfiles=list(dict.fromkeys(os.path.relpath(f) for f in workflow.configfiles)),
    shell:
        "python -m snakegpt.stages.lock_corpora --configfile {params.configfiles:q}"
        " 2>&1 | tee {log:q}"


rule fetch_corpus:
    output:
        corpus="results/corpora/{corpus}/corpus.json",
    log:
        "logs/fetch_corpus/{corpus}.log",
    benchmark:
        "logs/fetch_corpus/{corpus}.tsv"
    priority: 1  # first of all, since a source out of reach ends the run
    conda:
        "../envs/snakegpt.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=240,
    params:
        settings=settings_of("fetch_corpus"),
        code=code_of_stage("fetch_corpus"),
        arguments=arguments_of("fetch_corpus"),
    shell:
        "python -m snakegpt.run {params.arguments:q} --threads {threads} --state --log {log:q}"


rule fetch_weights:
    output:
        weights="results/weights/{weights}/weights.json",
    log:
        "logs/fetch_weights/{weights}.log",
    benchmark:
        "logs/fetch_weights/{weights}.tsv"
    priority: 1  # first of all, since a source out of reach ends the run
    conda:
        "../envs/snakegpt.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=240,
    params:
        settings=settings_of("fetch_weights"),
        code=code_of_stage("fetch_weights"),
        arguments=arguments_of("fetch_weights"),
    shell:
        "python -m snakegpt.run {params.arguments:q} --threads {threads} --state --log {log:q}"


rule build_tokenizer:
    input:
        unpack(inputs_of("build_tokenizer")),
    output:
        tokenizer="results/tokenizers/{tokenizer}/tokenizer.json",
    log:
        "logs/build_tokenizer/{tokenizer}.log",
    benchmark:
        "logs/build_tokenizer/{tokenizer}.tsv"
    conda:
        "../envs/snakegpt.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=60,
    params:
        settings=settings_of("build_tokenizer"),
        code=code_of_stage("build_tokenizer"),
        arguments=arguments_of("build_tokenizer"),
    shell:
        "python -m snakegpt.run {params.arguments:q} --threads {threads} --log {log:q}"


rule screen_documents:
    input:
        unpack(inputs_of("screen_documents")),
    output:
        drops="results/corpora/{corpus}/drops.json",
    log:
        "logs/screen_documents/{corpus}.log",
    benchmark:
        "logs/screen_documents/{corpus}.tsv"
    conda:
        "../envs/snakegpt.yaml"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=240,
    params:
        settings=settings_of("screen_documents"),
        code=code_of_stage("screen_documents"),
        arguments=arguments_of("screen_documents"),
    shell:
        "python -m snakegpt.run {params.arguments:q} --threads {threads} --log {log:q}"


# On a cluster whose profile says so: several parts by one job. Each then is a look-up for encode_tokens, which
# runs beside Snakemake.
rule encode_parts:
    input:
        unpack(inputs_of_batch),
    output:
        done=temp(touch("results/tokens/{corpus}-{tokenizer}/batch_{batch}.done")),
    log:
        "logs/encode_parts/{corpus}-{tokenizer}/{batch}.log",
    benchmark:
        "logs/encode_parts/{corpus}-{tokenizer}/{batch}.tsv"
    conda:
        "../envs/snakegpt.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=240,
    params:
        settings=settings_of_batch,
        code=code_of_stage("encode_tokens"),
        arguments=arguments_of_batch,
    shell:
        "python -m snakegpt.run {params.arguments:q} --threads {threads} --log {log:q}"


rule encode_tokens:
    input:
        unpack(inputs_of_part()),
    output:
        train="results/tokens/{corpus}-{tokenizer}/train_{part}.bin",
        val="results/tokens/{corpus}-{tokenizer}/val_{part}.bin",
        part="results/tokens/{corpus}-{tokenizer}/part_{part}.json",
    log:
        "logs/encode_tokens/{corpus}-{tokenizer}/{part}.log",
    benchmark:
        "logs/encode_tokens/{corpus}-{tokenizer}/{part}.tsv"
    localrule: ENCODE_JOBS is not None
    conda:
        "../envs/snakegpt.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=120,
    params:
        settings=settings_of("encode_tokens"),
        code=code_of_stage("encode_tokens"),
        arguments=arguments_of("encode_tokens"),
    shell:
        "python -m snakegpt.run {params.arguments:q} --threads {threads} --log {log:q}"


rule index_tokens:
    input:
        unpack(inputs_of("index_tokens")),
    output:
        manifest="results/tokens/{corpus}-{tokenizer}/manifest.json",
    log:
        "logs/index_tokens/{corpus}-{tokenizer}.log",
    benchmark:
        "logs/index_tokens/{corpus}-{tokenizer}.tsv"
    localrule: True
    conda:
        "../envs/snakegpt.yaml"
    threads: 1
    resources:
        mem_mb=500,
        runtime=10,
    params:
        settings=settings_of("index_tokens"),
        code=code_of_stage("index_tokens"),
        arguments=arguments_of("index_tokens"),
    shell:
        "python -m snakegpt.run {params.arguments:q} --threads {threads} --log {log:q}"
