{{/* The scrape jobs of the bundled Prometheus, and what to copy into one's own (docs/metrics.md): pods of ours that
have a port named metrics, with the labels that rollout analysis asks for. The operator's metrics name the namespace of
the object that they speak of: theirs is kept, and so no other pod is believed what it says of a namespace. Whoever may make
a pod may have it scraped: one that says too much is dropped, alone, before it fills the memory. A server with 16
adapters has 22,000 samples at the most, of 4 MB. No target_limit: beyond it, none would be scraped. */}}
{{- define "slmops.sampleLimit" -}}50000{{- end }}
{{- define "slmops.scrape" -}}
{{- $root := . }}
{{- range $what := list "objects" "operator" }}
- job_name: slmops-{{ $what }}
  honor_labels: {{ eq $what "operator" }}
  {{- if eq $what "objects" }}
  sample_limit: {{ include "slmops.sampleLimit" $root }}
  body_size_limit: 64MB
  {{- end }}
  kubernetes_sd_configs:
    - role: pod
      {{- if eq $what "operator" }}
      namespaces: {names: [{{ $root.Release.Namespace | quote }}]}
      {{- else if $root.Values.watchNamespaces }}
      namespaces: {names: {{ toJson (uniq (append $root.Values.watchNamespaces $root.Release.Namespace)) }}}
      {{- end }}
  relabel_configs:
    {{- if eq $what "operator" }}
    - {source_labels: [__meta_kubernetes_pod_label_app_kubernetes_io_name], regex: slmops-operator, action: keep}
    - {source_labels: [__meta_kubernetes_pod_label_app_kubernetes_io_instance], regex: {{ regexQuoteMeta $root.Release.Name | quote }}, action: keep}
    {{- else }}
    - {source_labels: [__meta_kubernetes_pod_label_app_kubernetes_io_managed_by], regex: slmops, action: keep}
    {{- end }}
    - {source_labels: [__meta_kubernetes_pod_container_port_name], regex: metrics, action: keep}
    - {source_labels: [__meta_kubernetes_pod_phase], regex: Pending|Succeeded|Failed, action: drop}
    - {source_labels: [__meta_kubernetes_namespace], target_label: namespace}
    - {source_labels: [__meta_kubernetes_pod_name], target_label: pod}
    - {source_labels: [__meta_kubernetes_pod_container_name], target_label: container}
    - {source_labels: [__meta_kubernetes_pod_label_slmops_dev_kind], target_label: slmops_kind}
    - {source_labels: [__meta_kubernetes_pod_label_slmops_dev_owner], target_label: slmops_owner}
    - {source_labels: [__meta_kubernetes_pod_label_slmops_dev_role], target_label: slmops_role}
    - {source_labels: [__meta_kubernetes_pod_label_slmops_dev_revision], target_label: slmops_revision}
{{- end }}
{{- end }}

{{- define "slmops.prometheusConfig" -}}
global:
  scrape_interval: {{ .Values.prometheus.bundled.scrapeInterval }}
scrape_configs:
  {{- include "slmops.scrape" . | nindent 2 }}
{{- end }}
